postern_unit_test(recorder_wire
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/recorder_wire_http2_test.cpp ${CMAKE_CURRENT_LIST_DIR}/recorder_wire_messages_test.cpp
  DEPS postern::recorder_wire_h2)
