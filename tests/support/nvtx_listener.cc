// What a profiler does: takes NVTX's calls and writes each as a line. The program reads them through listener_lines().
#include <nvtx3/nvToolsExt.h>

#include <mutex>
#include <string>

namespace {

std::mutex mutex;
std::string lines;
std::uint64_t last_range = 0;

void note(const std::string& line) {
  const std::lock_guard lock(mutex);
  lines += line + "\n";
}

std::string text_of(const nvtxEventAttributes_t* event) {
  return std::string(event->message.ascii) +
         (event->payloadType == NVTX_PAYLOAD_TYPE_UNSIGNED_INT64 ? " " + std::to_string(event->payload.ullValue) : "");
}

nvtxDomainHandle_t NVTX_API create(const char* name) {
  note(std::string("domain ") + name);
  return reinterpret_cast<nvtxDomainHandle_t>(&lines);
}
nvtxRangeId_t NVTX_API start(nvtxDomainHandle_t, const nvtxEventAttributes_t* event) {
  std::uint64_t id;
  {
    const std::lock_guard lock(mutex);
    id = ++last_range;
  }
  note("start " + std::to_string(id) + " " + text_of(event));
  return id;
}
void NVTX_API end(nvtxDomainHandle_t, nvtxRangeId_t range) {
  note("end " + std::to_string(range));
}
int NVTX_API push(nvtxDomainHandle_t, const nvtxEventAttributes_t* event) {
  note("push " + text_of(event));
  return 0;
}
int NVTX_API pop(nvtxDomainHandle_t) {
  note("pop");
  return 0;
}
void NVTX_API mark(nvtxDomainHandle_t, const nvtxEventAttributes_t* event) {
  note("mark " + text_of(event));
}

template <typename Function>
void take(NvtxFunctionTable table, NvtxCallbackIdCore2 id, Function* function) {
  *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const auto* const exports = static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!exports || !exports->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  take(table, NVTX_CBID_CORE2_DomainCreateA, &create);
  take(table, NVTX_CBID_CORE2_DomainRangeStartEx, &start);
  take(table, NVTX_CBID_CORE2_DomainRangeEnd, &end);
  take(table, NVTX_CBID_CORE2_DomainRangePushEx, &push);
  take(table, NVTX_CBID_CORE2_DomainRangePop, &pop);
  take(table, NVTX_CBID_CORE2_DomainMarkEx, &mark);
  return 1;
}

// All lines since the last call.
extern "C" const char* listener_lines() {
  static std::string given;
  const std::lock_guard lock(mutex);
  given = std::move(lines);
  lines.clear();
  return given.c_str();
}
