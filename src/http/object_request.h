// ObjectRequest: a list of pieces as the objects to write or the ranges to read. Internal to the object engine.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "http/objects.h"

namespace nixl::core::http {

enum class Step { kGet, kPut, kBegin, kPart, kFinish, kAbort };

// One object to write, or one range to read.
struct ObjectUnit {
  std::string key;
  std::uint64_t offset = 0;
  Body body;
  Copier* copier = nullptr;
  // In parts:
  std::vector<Body> parts;
  std::vector<std::string> part_ids;
  std::string upload;
  std::size_t parts_left = 0;
  bool begun = false;
};

struct Planned {
  Step step;
  std::uint32_t unit;
  std::uint32_t part = 0;
};

class ObjectRequest {
 public:
  bool write = false;
  bool staged = false;  // some memory is behind a Copier
  std::vector<ObjectUnit> units;
  // Guarded by the engine's lock:
  std::deque<Planned> ready;
  std::vector<std::shared_ptr<void>> active;  // ObjectEngine::Task, in the hands of the client
  std::size_t units_left = 0;
  bool stopping = false;
  Error error;
  std::atomic<ObjectEngine::State> state{ObjectEngine::State::kIdle};
};

}  // namespace nixl::core::http
