// Floor of object stores: a server that throws away what is PUT and answers GETs with (a range of) one pattern, and a
// client that does as little as a client can. What the two reach together is the server's own limit; a client is judged
// only where that is at least twice as quick.
//   object_sink serve PORT OBJECT_BYTES          until it is killed; GET /counted answers the bytes of all bodies so
//   far object_sink PUT|GET PORT OBJECT_BYTES COUNT CONNECTIONS     prints the seconds
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr char kPeriod[] = "0123456789abcdefghijklmnopqrstuvwxyz!";
constexpr std::size_t kPeriodBytes = sizeof kPeriod - 1, kChunk = 256 << 10;

const char* pattern() {
  static char memory[kChunk + kPeriodBytes];
  for (std::size_t i = 0; i < sizeof memory; ++i) memory[i] = kPeriod[i % kPeriodBytes];
  return memory;
}
const char* const blob = pattern();

bool send_all(int socket, const char* data, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t sent = ::send(socket, data, bytes, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    data += sent;
    bytes -= static_cast<std::size_t>(sent);
  }
  return true;
}
// Bytes `first` to `end` of the endless pattern. Copied by the kernel from the processor's cache, which costs it less
// than passing pages on (sendfile, splice).
bool send_pattern(int socket, std::size_t first, std::size_t end) {
  while (first < end) {
    const std::size_t bytes = std::min(end - first, kChunk);
    if (!send_all(socket, blob + first % kPeriodBytes, bytes)) return false;
    first += bytes;
  }
  return true;
}
// MSG_TRUNC: the kernel drops the bytes without copying them.
bool drop(int socket, std::size_t bytes) {
  static thread_local std::vector<char> room(1 << 20);
  while (bytes > 0) {
    const ssize_t got = ::recv(socket, room.data(), std::min(bytes, room.size()), MSG_TRUNC);
    if (got <= 0) return false;
    bytes -= static_cast<std::size_t>(got);
  }
  return true;
}
// Reads up to the end of a header; what came behind it stays in `text` after the header's `end`. False: closed.
bool read_header(int socket, std::string& text, std::size_t* end) {
  for (;;) {
    if (const std::size_t at = text.find("\r\n\r\n"); at != text.npos) {
      *end = at + 4;
      return true;
    }
    char part[16384];
    const ssize_t got = ::recv(socket, part, sizeof part, 0);
    if (got <= 0) return false;
    text.append(part, static_cast<std::size_t>(got));
  }
}
std::string field(const std::string& header, const char* name) {  // any case; "" if absent
  for (std::size_t at = header.find("\r\n"); at != header.npos; at = header.find("\r\n", at + 2)) {
    const std::size_t length = std::strlen(name);
    if (::strncasecmp(header.c_str() + at + 2, name, length) != 0 || header[at + 2 + length] != ':') continue;
    const std::size_t begin = header.find_first_not_of(' ', at + 3 + length);
    return header.substr(begin, header.find("\r\n", begin) - begin);
  }
  return "";
}

std::atomic<std::size_t> taken{0};

void serve(int socket, std::size_t object_bytes) {
  std::string text;
  for (std::size_t end = 0; read_header(socket, text, &end);) {
    const std::string header = text.substr(0, end);
    std::size_t body = std::strtoull(field(header, "content-length").c_str(), nullptr, 10);
    taken += body;
    if (!field(header, "expect").empty() && !send_all(socket, "HTTP/1.1 100 Continue\r\n\r\n", 25)) break;
    const std::size_t here = std::min(body, text.size() - end);
    text.erase(0, end + here);
    if (!drop(socket, body - here)) break;
    std::string reply = "HTTP/1.1 200 OK\r\nETag: \"0\"\r\nContent-Length: ";
    std::size_t first = 0, last = 0;
    if (header.compare(0, 4, "GET ") != 0) {
      reply += "0\r\n\r\n";
    } else if (header.compare(4, 9, "/counted ") == 0) {
      const std::string count = std::to_string(taken);
      reply += std::to_string(count.size()) + "\r\n\r\n" + count;
    } else {
      last = object_bytes;
      if (const std::string range = field(header, "range"); !range.empty()) {
        char* dash = nullptr;
        first = std::strtoull(range.c_str() + range.find('=') + 1, &dash, 10);
        last = std::min<std::size_t>(object_bytes, std::strtoull(dash + 1, nullptr, 10) + 1);
        reply.replace(9, 6, "206 Partial Content");
      }
      reply += std::to_string(last - first) + "\r\n\r\n";
    }
    if (!send_all(socket, reply.data(), reply.size()) || !send_pattern(socket, first, last)) break;
  }
  ::close(socket);
}

sockaddr_in address_of(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int run_server(int port, std::size_t object_bytes) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
  ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  const sockaddr_in address = address_of(port);
  if (::bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(listener, 256) != 0) {
    std::perror("object_sink: bind");
    return 1;
  }
  for (;;) {
    const int client = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (client < 0) continue;
    ::setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    std::thread(serve, client, object_bytes).detach();
  }
}

bool ask(int socket, bool put, std::size_t object_bytes) {
  std::string text;
  std::size_t end = 0;
  if (put) {
    const std::string head = "PUT /bucket/o HTTP/1.1\r\nContent-Length: " + std::to_string(object_bytes) + "\r\n\r\n";
    return send_all(socket, head.data(), head.size()) && send_pattern(socket, 0, object_bytes) &&
           read_header(socket, text, &end);
  }
  const char head[] = "GET /bucket/o HTTP/1.1\r\n\r\n";
  return send_all(socket, head, sizeof head - 1) && read_header(socket, text, &end) &&
         drop(socket, object_bytes - (text.size() - end));
}

int run_client(bool put, int port, std::size_t object_bytes, int count, int connections) {
  const auto begin = std::chrono::steady_clock::now();
  std::atomic<int> left{count}, bad{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < connections; ++i)
    threads.emplace_back([&] {
      const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      const sockaddr_in address = address_of(port);
      bool fine = ::connect(socket, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
      while (fine && left-- > 0) fine = ask(socket, put, object_bytes);
      bad += !fine;
      ::close(socket);
    });
  for (std::thread& thread : threads) thread.join();
  if (bad > 0) return std::fprintf(stderr, "object_sink: %d connections failed\n", bad.load()), 1;
  std::printf("%.6f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "serve" && argc == 4) return run_server(std::atoi(argv[2]), std::strtoull(argv[3], nullptr, 10));
  if ((mode == "PUT" || mode == "GET") && argc == 6)
    return run_client(mode == "PUT", std::atoi(argv[2]), std::strtoull(argv[3], nullptr, 10), std::atoi(argv[4]),
                      std::atoi(argv[5]));
  std::fprintf(stderr, "usage: object_sink serve PORT BYTES | object_sink PUT|GET PORT BYTES COUNT CONNECTIONS\n");
  return 2;
}
