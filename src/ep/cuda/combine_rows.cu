// Combine of rows as they are: the rank that holds a token's rows sends each to the token's owner, which weighs and adds them. One
// hop, nobody waits for weights: for few tokens, for few rows a token, and where sums must be exact or weights come late.
#include "ep/cuda/device/gather.cuh"

namespace nixl::core::ep {
namespace gpu {
namespace {

// Rows of a sum, and chunks of each, whose loads are in flight together: a trip to memory is what counts.
constexpr int rows_batch(RowsKind kind) {
  return kind == RowsKind::kFewRows ? kFewRows : 4;
}
constexpr int rows_chunks(RowsKind kind) {
  return kind == RowsKind::kFewRows ? 3 : 1;
}
enum Barrier { kAll };         // __syncthreads, at different places
constexpr int kRowsAhead = 2;  // rows of a message that a warp loads before it sends the first

// Where a row goes that does not fit the sender's slot with all others: to an area that all senders share, by the parity of the owner's
// operation.
__device__ __forceinline__ std::uint8_t* row_by_place(const CombineOp& a, std::uint8_t* areas, std::uint32_t parity,
                                                      int token, int place) {
  return areas + a.op.layout.exact_of(parity) + (std::int64_t{token} * a.route.topk + place) * a.shape.row_bytes;
}

// What a warp sends at once: a piece of rows of a message. Parcel `number` of the blocks that send is (message, source, piece, share of
// the entries), sources in turn.
template <int kPiece>
struct Parcel {
  int rank, message, piece, entry;
  bool possible;        // there may be such a message
  const int* count;     // of messages of its rank
  const int2* record;   // what dispatch left of it
  int at;               // this lane's first byte of the piece, in a row as it lies in memory
  unsigned chunks;      // set of those of which this lane has a part
  std::int64_t to;      // where the first row goes, in the sender's slot
  bool exists = false;  // this and what follows once it is loaded
  int token, entries;
  int row, place;  // lane e has those of entry e; row -1: it is zeros
  uint4 data[kRowsAhead][kPiece];

  // Which it is; needs nothing that the kernel before wrote.
  __device__ __forceinline__ void locate(const CombineOp& a, unsigned number) {
    const unsigned others = a.op.ranks - 1, pieces = a.shape.pieces;
    const int lane = threadIdx.x % 32;
    entry = static_cast<int>(number % a.split);
    number /= a.split;
    const unsigned in_turn = number / pieces;
    piece = static_cast<int>(number - in_turn * pieces);
    message = static_cast<int>(others <= 1 ? in_turn : in_turn / others);
    rank = a.op.rank + 1 + static_cast<int>(in_turn - message * others);
    if (rank >= a.op.ranks) rank -= a.op.ranks;
    possible = others > 0 && message < a.route.max_tokens;
    count = reinterpret_cast<const int*>(a.records + a.record.counts) + rank;
    record = reinterpret_cast<const int2*>(a.records + a.record.message_of(rank, a.route.max_tokens, message));
    at = piece * a.shape.per * kChunkBytes + lane * 16;
    chunks = 0;
#pragma unroll
    for (int c = 0; c < kPiece; ++c)
      chunks |= (c < a.shape.chunks_of(piece) && at + c * kChunkBytes < 2 * a.hidden ? 1u : 0u) << c;
    to = (std::int64_t{message} * a.route.topk + entry) * a.shape.row_bytes + piece * a.shape.piece_bytes;
  }
  // Worked out here, not where it is used.
  __device__ __forceinline__ void pin() {
    asm volatile(""
                 : "+r"(rank), "+r"(piece), "+r"(entry), "+l"(count), "+l"(record), "+r"(at), "+r"(chunks), "+l"(to));
  }
  __device__ __forceinline__ void load(const CombineOp& a) {
    exists = false;
    if (!possible) return;
    const int lane = threadIdx.x % 32, topk = a.route.topk;
    const int messages = __ldg(count);
    const int2 head = __ldg(record);
    const int2 own = lane < topk ? __ldg(record + 1 + lane) : make_int2(-1, 0);
    token = head.x >= 0 && head.x < a.route.max_tokens ? head.x : 0;
    entries = head.y < topk ? head.y : topk;
    place = own.y & 31;
    row = lane < entries && own.x < a.op.experts * a.op.ranks * a.route.max_tokens ? own.x : -1;
    exists = message < messages && entries > entry;
    if (exists) load_rows(a, entry);
  }
  // Of entries first, first + split, ... as far as there are.
  __device__ __forceinline__ void load_rows(const CombineOp& a, int first) {
#pragma unroll
    for (int u = 0; u < kRowsAhead; ++u) {
      const int e = first + u * static_cast<int>(a.split), from = __shfl_sync(~0u, row, e);
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(a.x) + from * (2 * a.x_stride) + at;
      const unsigned here = e < entries && from >= 0 ? chunks : 0;
#pragma unroll
      for (int c = 0; c < kPiece; ++c) data[u][c] = load_if(here >> c & 1, bytes + c * kChunkBytes);
    }
  }
};

template <int kLanes, int kPiece>
__device__ __forceinline__ void send_rows(const CombineOp& a, const Shared& s, Parcel<kPiece>& parcel) {
  if (!parcel.exists || !s.peers[parcel.rank].active) return;
  const Peer& peer = s.peers[parcel.rank];
  const int lane = threadIdx.x % 32, chunks = a.shape.chunks_of(parcel.piece), split = static_cast<int>(a.split);
  const bool in_slot = a.rows == Rows::kInSlot;
  const std::uint32_t tag = peer.tag_out;
  std::uint8_t* next = peer.remote + parcel.to;
#pragma unroll 1
  for (int first = parcel.entry; first < parcel.entries; first += kRowsAhead * split) {
    if (first != parcel.entry) parcel.load_rows(a, first);
#pragma unroll
    for (int u = 0; u < kRowsAhead; ++u) {
      const int e = first + u * split;
      if (u > 0 && e >= parcel.entries) continue;
      std::uint8_t* to = next;
      next += split * a.shape.row_bytes;
      if (!in_slot)
        to = row_by_place(a, peer.exact, peer.parity, parcel.token, __shfl_sync(~0u, parcel.place, e)) +
             parcel.piece * a.shape.piece_bytes;
      PieceSender<kLanes> out(a.shape, to, tag);
#pragma unroll
      for (int c = 0; c < kPiece; ++c)
        if (c < chunks) out.send(c, lane, parcel.data[u][c]);
      out.finish(lane);
    }
  }
}

// What a token's sum is made of: lane t of the warp holds what is added at turn t, below `count`; the sets say of which kind it is.
struct Contributions {
  unsigned long long from;  // a row of lines, or a plain row of our own
  float weight;
  std::uint32_t tag;
  int rank;
  int count;
  unsigned lines, last;  // sets of turns; last: of its rank
};
__device__ __forceinline__ Contributions contributions_of(const CombineOp& a, const Shared& s, int token, int slot) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int place = lane < topk ? s.own[slot * topk + lane].place : 0;
  const OwnEntry& entry = s.own[slot * topk + place];
  const int rank = lane < topk ? entry.rank : -1;
  const int route = rank >= 0 ? entry.route : -1, number = entry.number;
  const bool own = rank == a.op.rank;
  const Peer& peer = s.peers[rank < 0 ? a.op.rank : rank];
  Contributions c;
  c.rank = rank;
  c.weight = entry.weight;
  c.tag = peer.tag_in;
  const bool in_slot = a.rows == Rows::kInSlot;
  const std::int64_t row = in_slot ? std::int64_t{route} * topk + number : std::int64_t{token} * topk + place;
  const std::uint8_t* rows = in_slot ? peer.local : a.op.data + a.op.layout.exact_of(s.block->number & 1);
  c.from = own ? reinterpret_cast<unsigned long long>(row_at(a, route))
               : reinterpret_cast<unsigned long long>(rows + row * a.shape.row_bytes);
  const bool valid = route >= 0 && peer.active && (own ? c.from != 0 : route < a.route.max_tokens);
  const unsigned same = __match_any_sync(~0u, valid ? rank : -1 - lane), all = __ballot_sync(~0u, valid);
  bool last = same >> lane == 1;
  if (all & (all + 1)) {  // what does not come has left gaps: lane t takes the t-th that comes
    unsigned left = all;
#pragma unroll 1
    for (int i = 0; i < lane; ++i) left &= left - 1;
    const int source = left ? __ffs(left) - 1 : lane;
    c.from = __shfl_sync(~0u, c.from, source);
    c.weight = __shfl_sync(~0u, c.weight, source);
    c.tag = __shfl_sync(~0u, c.tag, source);
    c.rank = __shfl_sync(~0u, c.rank, source);
    last = __shfl_sync(~0u, last, source);
  }
  c.count = __popc(all);
  c.last = __ballot_sync(~0u, lane < c.count && last);
  c.lines = __ballot_sync(~0u, lane < c.count && c.rank != a.op.rank);
  return c;
}

// Inside a row: a chunk, and what this lane reads of its tail. Rows of our own are plain.
struct ChunkPlace {
  int within, data_at, tail_at, own_at;  // within: its piece
};
template <int kLanes>
__device__ __forceinline__ ChunkPlace place_of(const CombineOp& a, int chunk) {
  const int lane = threadIdx.x % 32, channel = chunk * 256 + lane * 8;
  const int piece = static_cast<unsigned>(chunk) / static_cast<unsigned>(a.shape.per);
  ChunkPlace at;
  at.within = chunk - piece * a.shape.per;
  at.data_at = piece * a.shape.piece_bytes + at.within * kChunkBytes;
  at.tail_at = piece * a.shape.piece_bytes + a.shape.per * kChunkBytes + Arriving<kLanes>::tail_at(at.within, lane);
  at.own_at = channel < a.hidden ? 2 * channel - lane * 16 : -lane * 16;
  return at;
}

// kChunks chunks of kBatch rows of a sum, all on their way at once.
template <int kLanes, int kBatch, int kChunks>
struct Batch {
  Arriving<kLanes> in[kBatch][kChunks];
  unsigned here;  // set of rows
  static constexpr unsigned kAllChunks = (1u << kChunks) - 1;

  // Rows [first, first + kBatch) of the sum, of which `chunks` chunks are meant. Returns with all that comes.
  __device__ __forceinline__ void take(const CombineOp& a, const Shared& s, const Contributions& terms, int first,
                                       const ChunkPlace (&at)[kChunks], int chunks) {
    const int lane = threadIdx.x % 32, rows = min(terms.count - first, kBatch);
    const unsigned lines = terms.lines >> first;
    here = (1u << rows) - 1;
    unsigned missing = 0;  // bit u * kChunks + k
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= rows) continue;
      const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, first + u));
      const bool sent = lines >> u & 1;
#pragma unroll
      for (int k = 0; k < kChunks; ++k)
        if (k == 0 || k < chunks) in[u][k].load(from, sent ? at[k].data_at : at[k].own_at, at[k].tail_at, lane, sent);
      if (sent) missing |= ((1u << chunks) - 1) << u * kChunks;
    }
    Patience patience;
    unsigned polls = 0;
#pragma unroll 1
    for (;;) {
      unsigned stale = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const std::uint32_t tag = __shfl_sync(~0u, terms.tag, first + u);
#pragma unroll
        for (int k = 0; k < kChunks; ++k)
          if (!in[u][k].fresh(lane, tag)) stale |= 1u << (u * kChunks + k);
      }
      missing &= __reduce_or_sync(~0u, stale);
      if (!missing) return;
      const int late = (__ffs(missing) - 1) / kChunks, rank = __shfl_sync(~0u, terms.rank, first + late);
      if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
        if (lane == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
        missing &= ~(kAllChunks << late * kChunks);
        here &= ~(1u << late);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!(missing >> u * kChunks & kAllChunks)) continue;
        const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, first + u));
#pragma unroll
        for (int k = 0; k < kChunks; ++k)
          if (missing >> (u * kChunks + k) & 1) in[u][k].load(from, at[k].data_at, at[k].tail_at, lane, true);
      }
    }
  }
};

// A chunk of a token's sum.
struct Sum {
  float total[8] = {}, group[8] = {};
  // The row added at `turn`.
  __device__ __forceinline__ void add(const CombineOp& a, const Contributions& terms, int turn, uint4 value) {
    add_weighted(group, __shfl_sync(~0u, terms.weight, turn), value);
    if (a.exact || !(terms.last >> turn & 1)) return;
    add_plain(total, rounded(group));
#pragma unroll
    for (float& sum : group) sum = 0;
  }
  __device__ __forceinline__ void store(const CombineOp& a, int token, int chunk) const {
    const int channel = chunk * 256 + threadIdx.x % 32 * 8;
    if (channel < a.hidden)
      __stcs(reinterpret_cast<uint4*>(a.out + std::int64_t{token} * a.hidden + channel),
             a.exact ? rounded(group) : rounded(total));
  }
};

// Adds up chunks of one token, one warp: chunk = first, first + step, ..., kChunks of them at once. More than one only where a batch
// holds all rows of a token.
template <int kLanes, int kBatch, int kChunks>
__device__ __forceinline__ void sum_token(const CombineOp& a, const Shared& s, int token, int slot, int first,
                                          int step) {
  const int lane = threadIdx.x % 32;
  if (first >= a.shape.chunks) return;
  const Contributions terms = contributions_of(a, s, token, slot);
#pragma unroll 1
  for (int chunk = first; chunk < a.shape.chunks; chunk += kChunks * step) {
    ChunkPlace at[kChunks];
    int chunks = 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
      if (k == 0 || chunk + k * step < a.shape.chunks) {
        at[k] = place_of<kLanes>(a, chunk + k * step);
        chunks = k + 1;
      }
    Batch<kLanes, kBatch, kChunks> batch;
    Sum sum;
#pragma unroll 1
    for (int turn = 0;;) {
      batch.take(a, s, terms, turn, at, chunks);
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
          if (batch.here >> u & 1)
            sum.add(a, terms, turn + u, batch.in[u][k].value(at[k].within, lane, terms.lines >> (turn + u) & 1));
        if (kChunks == 1) continue;
        if (k < chunks) sum.store(a, token, chunk + k * step);
        sum = Sum();
      }
      turn += kBatch;
      if (kChunks > 1 || turn >= terms.count) break;
    }
    if (kChunks == 1) sum.store(a, token, chunk);
  }
}

// One block adds everything up again without the ranks that failed.
template <int kLanes, RowsKind kKind>
__device__ __noinline__ void repair(const CombineOp& a, Shared s) {
  const int span = (a.route.num_tokens + gridDim.x - 1) / gridDim.x;
#pragma unroll 1
  for (int base = 0; base < a.route.num_tokens; base += span) {
    const int tokens = min(span, a.route.num_tokens - base);
    __syncthreads();
    load_entries(a, {base, 1, 0, 1}, base + tokens, s.own, threadIdx.x, rows_threads(kKind));
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < tokens; ++slot) {
      __syncthreads();
      if constexpr (kKind == RowsKind::kFewTokens)
        gather_token<kLanes>(a, s, base + slot, slot, 0, 1, Offsets<kLanes>(a, 0));
      else
        sum_token<kLanes, rows_batch(kKind), rows_chunks(kKind)>(a, s, base + slot, slot, threadIdx.x / 32,
                                                                 rows_threads(kKind) / 32);
    }
  }
}

// What this block does. For few tokens, where blocks are plenty, the last ones only add up: they wait where the first rows arrive
// instead of sending before.
struct Role {
  bool sends, adds;
  unsigned senders;  // the blocks that send, from 0 on
  Share share;       // of own tokens
};
template <RowsKind kKind>
__device__ __forceinline__ Role role_of(const CombineOp& a) {
  constexpr unsigned kWarps = rows_threads(kKind) / 32;
  constexpr bool kFew = kKind == RowsKind::kFewTokens;
  const bool sends = a.op.parts & kSends, adds = a.op.parts & kReceives;
  const unsigned tokens = a.route.num_tokens, wanted = kFew ? (a.shape.pieces + kGatheredPieces - 1) / kGatheredPieces
                                                            : (a.shape.chunks + kWarps - 1) / kWarps;
  const unsigned most = tokens ? gridDim.x / 2 / tokens : 0, adders = tokens * (most < wanted ? most : wanted);
  if (!kFew || !sends || !adds || adders == 0)
    return {sends, adds, gridDim.x, share_of_tokens(a, wanted, blockIdx.x, gridDim.x)};
  const unsigned senders = gridDim.x - adders;
  if (blockIdx.x < senders) return {true, false, senders, {a.route.num_tokens, 1, 0, 1}};
  return {false, true, senders, share_of_tokens(a, wanted, blockIdx.x - senders, adders)};
}

// Begins the operation: headers, and where rows of each owner go. One warp.
__device__ __forceinline__ void begin(const CombineOp& a, const Shared& s) {
  const Op& op = a.op;
  begin_operation(op, *s.block, s.peers, a.rows == Rows::kByPlace);
  __syncwarp();
  if (!(op.parts & kSends)) return;
  send_headers(a, *s.block, s.peers);
  if (a.rows != Rows::kByPlace) return;
#pragma unroll 1
  for (int rank = threadIdx.x % 32; rank < op.ranks; rank += 32)
    if (s.peers[rank].active && rank != op.rank && s.peers[rank].parity == kUnknownParity)
      await_header(op, *s.block, s.peers[rank], rank, nullptr);
}

}  // namespace
}  // namespace gpu

template <int kLanes, gpu::RowsKind kKind>
__global__ void __launch_bounds__(gpu::rows_threads(kKind), 1) combine_rows(const __grid_constant__ gpu::CombineOp a) {
  using namespace gpu;
  constexpr int kWarps = rows_threads(kKind) / 32;
  constexpr int kControl = kWarps - 1;  // the warp that begins the operation,
  constexpr int kEntries = kWarps - 2;  // and the one that loads the entries: they have the fewest rows to send
  const Shared s = carve(a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Role role = role_of<kKind>(a);
  const Share& share = role.share;
  const bool receives = a.op.parts & kReceives;
  unsigned next = blockIdx.x + warp * role.senders;
  Parcel<rows_piece(kKind)> parcel;
  parcel.locate(a, next);
  parcel.pin();
  Offsets<kLanes> offsets(a, share.part * kGatheredPieces);
  if (kKind == RowsKind::kFewTokens) offsets.pin();
  touch_parameters(a);
  if (warp != kControl) wait_for_predecessor();
  if (warp == kControl) begin(a, s);
  if (warp == kEntries) load_entries(a, share, a.route.num_tokens, s.own, lane, 32);
  if (warp == kControl) sync_some(kAll, rows_threads(kKind));  // nobody waits for its rows
  if (role.sends) parcel.load(a);
  if (warp != kControl) sync_some(kAll, rows_threads(kKind));
  send_rows<kLanes>(a, s, parcel);
  unsigned items = 0;
  if (role.sends)
    items = static_cast<unsigned>(most_messages(a, load_count(a, lane))) * (a.op.ranks - 1) * a.shape.pieces * a.split;
  if (warp == kControl && receives && blockIdx.x == 0) await_headers(a, *s.block, s.peers);
  const unsigned in_round = kWarps * role.senders;
  if constexpr (kKind == RowsKind::kFewTokens) {
#pragma unroll 1
    while ((next += in_round) < items) {
      parcel.locate(a, next);
      parcel.load(a);
      send_rows<kLanes>(a, s, parcel);
    }
    if (role.adds)
#pragma unroll 1
      for (int token = share.first, slot = 0; token < a.route.num_tokens; token += share.step, ++slot) {
        if (slot > 0) __syncthreads();  // the rows of the last one are added up
        gather_token<kLanes>(a, s, token, slot, share.part, share.parts, offsets);
      }
  } else {
    // Sends in rounds; after a round the sums of tokens whose messages were sent, everywhere, at least one round before.
    const unsigned per_token = (a.op.ranks - 1) * a.shape.pieces * a.split;
    const int first = share.part * kWarps + (kWarps - 1 - warp), step = share.parts * kWarps;
    int token = share.first, slot = 0;
#pragma unroll 1
    for (unsigned past = 0;; past += in_round) {
      const bool all_sent = next + in_round >= items;
      if (receives)
#pragma unroll 1
        for (; token < a.route.num_tokens && (all_sent || (token + 1) * per_token <= past); token += share.step, ++slot)
          sum_token<kLanes, rows_batch(kKind), rows_chunks(kKind)>(a, s, token, slot, first, step);
      if (all_sent) break;
      next += in_round;
      Parcel<rows_piece(kKind)> following;  // not the first one again: its rows would be kept while sums are made
      following.locate(a, next);
      following.load(a);
      send_rows<kLanes>(a, s, following);
    }
  }
  if (!receives) return finish_sending(a.op, *s.block);
  if (finish_operation(a.op, *s.block, s.peers)) repair<kLanes, kKind>(a, s);
}

namespace gpu {
template <int kLanes>
const void* rows_kernel(RowsKind kind) {
  return kind == RowsKind::kFewTokens ? reinterpret_cast<const void*>(combine_rows<kLanes, RowsKind::kFewTokens>)
         : kind == RowsKind::kFewRows ? reinterpret_cast<const void*>(combine_rows<kLanes, RowsKind::kFewRows>)
                                      : reinterpret_cast<const void*>(combine_rows<kLanes, RowsKind::kMany>);
}
const void* combine_rows_kernel(int lanes, RowsKind kind) {
  return lanes == 1 ? rows_kernel<1>(kind) : rows_kernel<8>(kind);
}
}  // namespace gpu
}  // namespace nixl::core::ep
