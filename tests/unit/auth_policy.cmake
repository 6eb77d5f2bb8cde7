postern_unit_test(auth_policy
  SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_hujson_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_load_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_decide_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_corpus_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_language_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_explain_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_session_rules_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_network_file_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/auth_policy_sources_test.cpp
  DEPS postern::auth_policy nlohmann_json::nlohmann_json)
target_compile_definitions(auth_policy_test PRIVATE POSTERN_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data" POSTERN_PACKAGING="${PROJECT_SOURCE_DIR}/packaging")
