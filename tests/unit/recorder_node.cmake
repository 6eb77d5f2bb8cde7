postern_unit_test(recorder_node
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/recorder_node_read_test.cpp ${CMAKE_CURRENT_LIST_DIR}/recorder_node_upload_test.cpp
  DEPS postern::recorder_node)
add_dependencies(recorder_node_test postern-recorder)
target_compile_definitions(recorder_node_test PRIVATE POSTERN_RECORDER="$<TARGET_FILE:postern-recorder>")
