# Stands in for postern-net under a real posternd (tests/integration/hostile).
add_executable(hostile_net ${CMAKE_CURRENT_LIST_DIR}/../tools/hostile_net.cpp)
target_link_libraries(hostile_net PRIVATE postern_options postern::base postern::sshd_protocol nlohmann_json::nlohmann_json)
