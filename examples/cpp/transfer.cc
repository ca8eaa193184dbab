// Two agents of one process: one writes into the other's memory, then reads it back.
#include <nixl/agent.h>
#include <nixl/backend.h>

#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
  const std::string backend = argc > 1 ? argv[1] : "UCX";
  nixl::AgentConfig config;
  config.backends = {backend};
  auto agent = std::make_unique<nixl::Agent>("my_agent", config);
  nixl::Agent remote("remote_agent", config);

  std::vector<char> buffer(1 << 20, 'w'), target(1 << 20, '-');
  void* addr = buffer.data();
  const std::size_t size = buffer.size();
  std::vector<nixl::MemDescriptor> local_descs = {{addr, size, 0, nixl::MemType::DRAM}};
  std::vector<nixl::MemDescriptor> remote_descs = {{target.data(), static_cast<int>(target.size()), 0}};
  auto reg = agent->registerMemory(local_descs, backend);
  auto remote_reg = remote.registerMemory(remote_descs);

  agent->addRemoteAgent(remote.getMetadata());
  remote.addRemoteAgent(agent->getMetadata());

  auto write =
      agent->prepareTransfer(nixl::OpType::WRITE, local_descs, remote_descs, "remote_agent", backend, "written");
  agent->postTransfer(write);
  while (agent->checkTransfer(write) != nixl::XferState::DONE) {
  }
  nixl::Notifs notifs;
  while (notifs.empty()) notifs = remote.getNewNotifs();

  std::memset(buffer.data(), '-', size);
  auto read = agent->prepareTransfer(nixl::OpType::READ, local_descs, remote_descs, "remote_agent", backend);
  agent->postTransfer(read);
  if (agent->waitTransfer(read, std::chrono::seconds(10)) != nixl::XferState::DONE) return 2;

  agent->releaseTransfer(write);
  agent->releaseTransfer(read);
  agent->deregisterMemory(reg);
  remote.deregisterMemory(remote_reg);
  const bool right =
      target == std::vector<char>(size, 'w') && buffer == target && notifs["my_agent"].at(0) == "written";
  std::printf("%s: %s\n", backend.c_str(), right ? "ok" : "WRONG BYTES");
  return right ? 0 : 1;
}
