postern_unit_test(recorder_cast
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/recorder_cast_chain_test.cpp ${CMAKE_CURRENT_LIST_DIR}/recorder_cast_decoder_test.cpp
          ${CMAKE_CURRENT_LIST_DIR}/recorder_cast_encoder_test.cpp
  DEPS postern::recorder_cast)
target_compile_definitions(recorder_cast_test PRIVATE POSTERN_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data")
