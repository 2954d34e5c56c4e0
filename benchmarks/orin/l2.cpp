// The L2 cache of the model of Orin: 2 MB of 128-byte lines with 4 32-byte sectors, 16 ways, least recently used, write back.
//
// A block touches the sectors of the traced block that represents it, each tensor's moved by the offset of the block's tile. As
// many blocks as fit the GPU run at once and take turns of `turn` sectors, in the order of the trace; then the next ones follow.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Line {
  int64_t tag = -1;
  uint64_t used = 0;
  uint8_t valid = 0, dirty = 0;  // one bit per sector
};

class Cache {
 public:
  Cache(int64_t bytes, int ways) : ways_(ways), sets_(bytes / 128 / ways), lines_(bytes / 128) {}

  void touch(int64_t sector, bool write) {
    const int64_t tag = sector >> 2;
    const uint8_t bit = static_cast<uint8_t>(1 << (sector & 3));
    Line& line = find(tag);
    line.used = ++clock_;
    if (!(line.valid & bit) && !write) ++missed_;  // a written sector is not fetched: kernels here write whole ones
    line.valid |= bit;
    if (write) line.dirty |= bit;
  }

  int64_t missed() const { return missed_; }
  int64_t written() {
    for (Line& line : lines_) clean(line);
    return written_;
  }

 private:
  Line& find(int64_t tag) {
    const uint64_t hash = static_cast<uint64_t>(tag) * 0x9E3779B97F4A7C15ull >> 20;  // strides must not map to few sets
    Line* set = &lines_[hash % sets_ * ways_];
    Line* oldest = set;
    for (int way = 0; way < ways_; ++way) {
      if (set[way].tag == tag) return set[way];
      if (set[way].used < oldest->used) oldest = &set[way];
    }
    clean(*oldest);
    oldest->tag = tag, oldest->valid = 0;
    return *oldest;
  }

  void clean(Line& line) {
    written_ += __builtin_popcount(line.dirty);
    line.dirty = 0;
  }

  int64_t ways_, sets_, missed_ = 0, written_ = 0;
  uint64_t clock_ = 0;
  std::vector<Line> lines_;
};

struct Running {
  int64_t block, next;
};

}  // namespace

// sector = address * 2 + write, tensor beside it; pattern p is sectors[first[p]] .. sectors[first[p + 1] - 1]. Block b runs
// pattern[b] with every sector of tensor t moved by shift[b * tensors + t] sectors. Returns the sectors read and written in DRAM.
extern "C" void l2_traffic(int64_t bytes, int ways, int64_t resident, int64_t turn, int64_t blocks, const int64_t* sectors,
                           const int32_t* tensor, const int64_t* first, const int32_t* pattern, const int64_t* shift,
                           int tensors, int64_t* read, int64_t* written) {
  Cache cache(bytes, ways);
  std::vector<Running> running;
  int64_t waiting = 0;
  while (waiting < std::min(blocks, resident)) running.push_back({waiting, first[pattern[waiting]]}), ++waiting;
  for (bool busy = true; busy;) {
    busy = false;
    for (Running& r : running) {
      if (r.block < 0) continue;
      busy = true;
      const int64_t* move = shift + r.block * tensors;
      const int64_t end = first[pattern[r.block] + 1], stop = std::min(end, r.next + turn);
      for (; r.next < stop; ++r.next) cache.touch((sectors[r.next] >> 1) + move[tensor[r.next]], sectors[r.next] & 1);
      if (r.next < end) continue;
      r.block = waiting < blocks ? waiting++ : -1;
      if (r.block >= 0) r.next = first[pattern[r.block]];
    }
  }
  *read = cache.missed();
  *written = cache.written();
}
