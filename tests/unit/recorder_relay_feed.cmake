# Not a unit test: the session in a test's hand that tests/integration/relay uses.
add_executable(relay_feed ${PROJECT_SOURCE_DIR}/tests/tools/relay_feed.cpp)
target_link_libraries(relay_feed PRIVATE postern_options postern::recorder_link)
