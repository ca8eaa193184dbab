// Memory to a file and back through POSIX: the own agent is the remote side, the file an offset, a length and a descriptor.
#include <fcntl.h>
#include <nixl/agent.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

int main() {
  char path[] = "/tmp/nixl_example_XXXXXX";
  const int fd = mkstemp(path);
  if (fd < 0) return 2;
  nixl::AgentConfig config;
  config.backends = {"POSIX"};
  nixl::Agent agent("storage_agent", config);

  std::vector<unsigned char> data(256 << 10);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<unsigned char>(i * 31);
  const auto expected = data;
  std::vector<nixl::MemDescriptor> memory = {{data.data(), data.size(), 0}};
  std::vector<nixl::MemDescriptor> file = {{0, data.size(), fd, nixl::MemType::FILE}};
  agent.registerMemory(memory);
  agent.registerMemory(file);
  for (const auto op : {nixl::OpType::WRITE, nixl::OpType::READ}) {
    auto transfer = agent.prepareTransfer(op, memory, file, "storage_agent");
    agent.postTransfer(transfer);
    while (agent.checkTransfer(transfer) != nixl::XferState::DONE) {
    }
    if (op == nixl::OpType::WRITE) data.assign(data.size(), 0);
  }
  close(fd);
  unlink(path);
  std::printf("%s\n", data == expected ? "ok" : "WRONG BYTES");
  return data == expected ? 0 : 1;
}
