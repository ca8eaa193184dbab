// The etcd store: version 3 of the interface, through its JSON gateway. `endpoint` is one or more of
// "http://host:2379", "https://host:2379" or "host:2379", separated by commas; the first that answers is used.
#pragma once
#include "contract/entry.h"

namespace nixl::core {

const StoreEntry& store_etcd();

}  // namespace nixl::core
