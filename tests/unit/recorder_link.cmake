postern_unit_test(recorder_link
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/recorder_wire_relay_link_test.cpp ${CMAKE_CURRENT_LIST_DIR}/recorder_wire_local_test.cpp
  DEPS postern::recorder_link)
