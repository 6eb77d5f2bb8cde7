postern_unit_test(recorder_relay
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/recorder_relay_failover_test.cpp ${CMAKE_CURRENT_LIST_DIR}/recorder_relay_settings_test.cpp
          ${CMAKE_CURRENT_LIST_DIR}/recorder_relay_upload_test.cpp
  DEPS postern::recorder_relay)
