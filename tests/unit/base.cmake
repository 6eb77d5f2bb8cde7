postern_unit_test(base
  SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/base_address_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/base_clock_watch_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/base_file_watch_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/base_id_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/base_poller_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/base_processes_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/base_seqpacket_test.cpp
  DEPS postern::base postern::file_watch)
