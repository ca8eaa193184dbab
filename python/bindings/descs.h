// Descriptor lists as Python sees them: three classes over nixl::Descs, and the readers of what callers pass in.
#pragma once
#include <nanobind/nanobind.h>
#include <nixl/agent.h>

#include <string>

namespace nixl::python {

namespace nb = nanobind;

struct XferList {
  Descs descs;
};
struct RegList {
  Descs descs;
};
struct RemoteList {
  Descs descs;  // meta holds the agent's name
};

// str (as UTF-8) or bytes; TypeError for anything else. Bytes that str_of could not read come back as they were.
std::string text_of(nb::handle value, const char* what);
// The same for what goes to a peer, which may also be a bytearray or a contiguous memoryview.
std::string payload_of(nb::handle value, const char* what);
nb::bytes bytes_of(const std::string& text);
// Text of other agents need not be UTF-8: strange bytes become lone surrogates, as in the names of files.
nb::str str_of(const std::string& text);

nb::object error_object(const Error& error);  // an exception of nixl._errors

void bind_descs(nb::module_& module);
void bind_agent(nb::module_& module);

}  // namespace nixl::python
