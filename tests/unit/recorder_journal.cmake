postern_unit_test(recorder_journal
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/recorder_journal_journal_test.cpp
  DEPS postern::recorder_journal)
