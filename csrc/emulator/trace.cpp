#include "trace.h"

#include <algorithm>
#include <array>
#include <set>
#include <tuple>

#include "global_memory.h"

namespace lora_edge::emulator {

TracePlan trace_plan;
bool tracing;

namespace {

struct Access {
  Space space;
  int bytes;
  uint32_t lanes = 0, active = 0;
  std::array<uint64_t, 32> address{};
};

// One call site in one warp: how often each lane has passed it, and the index in `open` of each pass.
struct Passes {
  std::array<size_t, 32> of_lane{};
  std::vector<size_t> opened;
};

struct Warp {
  std::map<std::tuple<const char*, int, Space>, Passes> sites;
  std::vector<Access> open;  // in the order of their first lane; already counted if all lanes have arrived
};

struct Totals {
  int64_t read_sectors, write_sectors, wavefronts, wavefronts_ideal, mma_tf32, mma_f16, mma_bf16, barriers;
  int64_t matrices, shuffles;
  int64_t bytes[4], wide[4];  // bytes per lane, and accesses of 16 bytes, by space
};

constexpr uint64_t kBarrier = ~uint64_t{0};

int64_t launch_number, traced_block;
Warp warps[32];
Totals totals;
std::set<uint64_t> distinct_reads;
std::vector<uint64_t> records;
int64_t records_written;

// A sector's record without the write flag. Memory outside the registered buffers is buffer 255.
uint64_t sector_of(uint64_t address) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    const uint64_t data = reinterpret_cast<uint64_t>(buffers[i].data);
    if (address >= data && address < data + static_cast<uint64_t>(buffers[i].end)) {
      return static_cast<uint64_t>(i) << 56 | (address - data) / 32;
    }
  }
  return uint64_t{255} << 56 | (address / 32 & ((uint64_t{1} << 55) - 1));
}

void count_global(const Access& access) {
  const bool write = access.space == Space::global_write;
  std::vector<uint64_t> sectors;
  for (int lane = 0; lane < 32; ++lane) {
    if ((access.active >> lane & 1) != 0) sectors.push_back(sector_of(access.address[static_cast<size_t>(lane)]));
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  (write ? totals.write_sectors : totals.read_sectors) += static_cast<int64_t>(sectors.size());
  for (const uint64_t sector : sectors) {
    if (!write) distinct_reads.insert(sector);
    records.push_back(sector | static_cast<uint64_t>(write) << 55);
  }
}

// Counts the wavefronts of the words that one pass could transfer: the distinct words in the fullest bank.
void count_words(std::vector<uint64_t>& words) {
  if (words.empty()) return;
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int banks[32] = {};
  for (const uint64_t word : words) ++banks[word % 32];
  totals.wavefronts += *std::max_element(banks, banks + 32);
  totals.wavefronts_ideal += static_cast<int64_t>(words.size() + 31) / 32;
}

void count_shared(const Access& access) {
  const int lanes_per_pass = access.bytes == 16 ? 8 : 32;
  for (int first = 0; first < 32; first += lanes_per_pass) {
    std::vector<uint64_t> words;
    for (int lane = first; lane < first + lanes_per_pass; ++lane) {
      if ((access.active >> lane & 1) == 0) continue;
      const uint64_t begin = access.address[static_cast<size_t>(lane)];
      for (uint64_t byte = begin; byte < begin + static_cast<uint64_t>(access.bytes); byte += 4) words.push_back(byte / 4);
    }
    count_words(words);
  }
}

void count(const Access& access) {
  totals.bytes[static_cast<int>(access.space)] += access.bytes;
  totals.wide[static_cast<int>(access.space)] += access.bytes == 16;
  const bool global = access.space == Space::global_read || access.space == Space::global_write;
  global ? count_global(access) : count_shared(access);
}

constexpr uint32_t kWholeWarp = 0xffffffff;

void flush(Warp& warp) {
  for (const Access& access : warp.open) {
    if (access.lanes != kWholeWarp) count(access);
  }
  warp.open.clear(), warp.sites.clear();
}

void add(Space space, uint64_t address, int bytes, bool active, Site site) {
  Warp& warp = warps[now.thread / 32];
  const size_t lane = static_cast<size_t>(now.thread % 32);
  Passes& passes = warp.sites[{site.file, site.line, space}];
  const size_t pass = passes.of_lane[lane]++;
  if (pass == passes.opened.size()) passes.opened.push_back(warp.open.size()), warp.open.push_back({space, bytes});
  Access& access = warp.open[passes.opened[pass]];
  access.lanes |= 1u << lane;
  if (active) access.active |= 1u << lane, access.address[lane] = address;
  if (access.lanes == kWholeWarp) count(access);
}

}  // namespace

void trace_begin_run() { launch_number = records_written = 0; }

std::vector<int64_t> trace_launch(const Launch& launch) {
  std::fprintf(trace_plan.lines,
               "{\"launch\": %lld, \"kernel\": \"%p\", \"blocks\": %lld, \"threads\": %d, \"shared_bytes\": %d}\n",
               static_cast<long long>(launch_number), launch.kernel, static_cast<long long>(launch.blocks), launch.threads,
               launch.shared_bytes);
  std::vector<int64_t> chosen;
  for (const int64_t block : trace_plan.blocks[launch_number]) {
    if (block >= 0 && block < launch.blocks) chosen.push_back(block);
  }
  ++launch_number;
  return chosen;
}

void trace_begin_block(int64_t block) {
  tracing = true;
  traced_block = block;
  totals = Totals{};
  distinct_reads.clear(), records.clear();
}

void trace_end_block() {
  for (Warp& warp : warps) flush(warp);
  tracing = false;
  std::fprintf(trace_plan.lines,
               "{\"launch\": %lld, \"block\": %lld, \"global_read_sectors\": %lld, \"global_write_sectors\": %lld, "
               "\"global_read_distinct\": %zu, \"shared_wavefronts\": %lld, \"shared_wavefronts_ideal\": %lld, "
               "\"mma_tf32\": %lld, \"mma_f16\": %lld, \"mma_bf16\": %lld, \"barriers\": %lld, "
               "\"sectors_begin\": %lld, \"sectors\": %zu",
               static_cast<long long>(launch_number - 1), static_cast<long long>(traced_block),
               static_cast<long long>(totals.read_sectors), static_cast<long long>(totals.write_sectors), distinct_reads.size(),
               static_cast<long long>(totals.wavefronts), static_cast<long long>(totals.wavefronts_ideal),
               static_cast<long long>(totals.mma_tf32), static_cast<long long>(totals.mma_f16),
               static_cast<long long>(totals.mma_bf16), static_cast<long long>(totals.barriers),
               static_cast<long long>(records_written), records.size());
  const char* const spaces[] = {"read_global", "write_global", "read_shared", "write_shared"};
  for (size_t i = 0; i < 4; ++i) {
    std::fprintf(trace_plan.lines, ", \"%s_bytes\": %lld, \"%s_wide\": %lld", spaces[i],
                 static_cast<long long>(totals.bytes[i]), spaces[i], static_cast<long long>(totals.wide[i]));
  }
  std::fprintf(trace_plan.lines, ", \"load_matrix\": %lld, \"shuffle_xor\": %lld}\n",
               static_cast<long long>(totals.matrices), static_cast<long long>(totals.shuffles));
  if (trace_plan.sectors != nullptr) std::fwrite(records.data(), sizeof(uint64_t), records.size(), trace_plan.sectors);
  records_written += static_cast<int64_t>(records.size());
}

void trace_global(bool write, const void* address, int bytes, bool ok, Site site) {
  add(write ? Space::global_write : Space::global_read, reinterpret_cast<uint64_t>(address), bytes, ok, site);
}

void trace_shared(Space space, int begin, int bytes, Site site) { add(space, static_cast<uint64_t>(begin), bytes, true, site); }

void trace_matrix(const int (&row_bytes)[8]) {
  std::vector<uint64_t> words;
  for (const int begin : row_bytes) {
    for (int i = 0; i < 4; ++i) words.push_back(static_cast<uint64_t>(begin / 4 + i));
  }
  ++totals.matrices;
  count_words(words);
}

void trace_collective(Kind kind, int warp) {
  if (kind == Kind::sync_block) {
    for (Warp& each : warps) flush(each);
    ++totals.barriers;
    records.push_back(kBarrier);
    return;
  }
  flush(warps[warp]);
  totals.shuffles += kind == Kind::shuffle_xor;
  totals.mma_tf32 += kind == Kind::mma_tf32;
  totals.mma_f16 += kind == Kind::mma_f16;
  totals.mma_bf16 += kind == Kind::mma_bf16;
}

}  // namespace lora_edge::emulator
