postern_unit_test(pty
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/pty_modes_test.cpp ${CMAKE_CURRENT_LIST_DIR}/pty_become_user_test.cpp
  DEPS postern::pty nlohmann_json::nlohmann_json)
