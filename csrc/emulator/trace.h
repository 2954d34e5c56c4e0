// Records what chosen blocks of a launch request from the memory system, for the performance model.
//
// The accesses of lanes are grouped into warp instructions by call site and by how often the lane has passed it since the
// warp's last barrier or collective. There is one JSON line per launch ("launch", "kernel", "blocks", "threads",
// "shared_bytes") and one per block:
//   global_read_sectors, global_write_sectors   32-byte sectors summed over warp instructions: the traffic to L2 without an L1
//   global_read_distinct                        distinct sectors that the block reads: the same with a perfect L1
//   shared_wavefronts, shared_wavefronts_ideal  passes over the 32 banks, with and without conflicts
//   mma, barriers, sectors_begin, sectors       mma by type; sync_block; this block's records in the file of sectors
//   read_global_bytes, read_global_wide, ...    also write_global, read_shared, write_shared: bytes per lane, accesses of 16
//                                               bytes, summed over warp instructions, including those that are masked off
//   load_matrix, shuffle_xor                    matrices loaded, and shuffles, of all warps
// The file of sectors holds one little-endian uint64 per record in program order: buffer << 56 | write << 55 | sector of the
// buffer; all ones is a barrier of the block.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <vector>

#include "scheduler.h"
#include "site.h"

namespace lora_edge::emulator {

enum class Space { global_read, global_write, shared_read, shared_write };

struct TracePlan {
  bool on = false;                                  // if so, only the chosen blocks run
  std::map<int64_t, std::vector<int64_t>> blocks;  // by launch, counted from 0
  std::FILE *lines = nullptr, *sectors = nullptr;
};
extern TracePlan trace_plan;
extern bool tracing;  // whether the running block is traced

void trace_begin_run();
// Returns the blocks of the launch to run.
std::vector<int64_t> trace_launch(const Launch& launch);
void trace_begin_block(int64_t block);
void trace_end_block();

void trace_global(bool write, const void* address, int bytes, bool ok, Site site);
void trace_shared(Space space, int begin, int bytes, Site site);
void trace_matrix(const int (&row_bytes)[8]);
void trace_collective(Kind kind, int warp);  // for sync_block, every warp

}  // namespace lora_edge::emulator
