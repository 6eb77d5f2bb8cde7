postern_unit_test(cli SOURCES ${CMAKE_CURRENT_LIST_DIR}/cli_recordings_test.cpp ${CMAKE_CURRENT_LIST_DIR}/cli_report_test.cpp DEPS postern::cli)
