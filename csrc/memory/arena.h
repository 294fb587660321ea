// Host memory for tensors: pooled blocks under a byte budget. Nothing here knows torch.
//
// A Block is reference counted: whoever acquired it holds one reference, every tensor over it one
// more. The last release returns it to its arena, which keeps it for the next request or unmaps it.
// Floor of acquire(): one uncontended lock and one ordered lookup, well under a microsecond.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace mkrs::memory {

constexpr int64_t kAlignment = 64;           // one cache line, the widest vector load
constexpr int64_t kHugePage = 2 << 20;       // x86-64 and the default of arm64 Linux
constexpr int64_t kMapBytes = 1 << 20;       // from here on blocks are mappings of their own
constexpr int64_t kPackedBytes = 64 << 20;   // up to here mappings lie one after the other
constexpr int64_t kReserved = 1 << 30;       // address space that these are cut from
constexpr int64_t kMinFrameChunk = 1 << 16;  // a frame's first piece

enum class Strategy {
  Pooled,  // returned blocks are kept for reuse
  Bump,    // allocations only inside frames
  None,    // every block is fresh and goes back to the system at once
};

class OverBudget : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Stats {
  int64_t active = 0;         // bytes of blocks that are in use
  int64_t requested = 0;      // bytes that were asked for in those
  int64_t cached = 0;         // bytes of blocks kept for reuse
  int64_t peak = 0;           // largest `active` so far
  int64_t reserved_peak = 0;  // largest `active + cached` so far
  int64_t allocations = 0;    // blocks handed out
  int64_t hits = 0;           // of those, from the pool
  int64_t live = 0;           // blocks that are in use
};

class Arena;
struct Block;
using BlocksByAge = std::list<Block*>;
using BlocksBySize = std::multimap<int64_t, Block*>;

struct Block {
  char* data = nullptr;
  int64_t size = 0;       // usable bytes
  int64_t requested = 0;  // bytes that the present user asked for
  bool mapped = false;    // a mapping, else from posix_memalign
  std::atomic<int64_t> refs{0};
  std::shared_ptr<Arena> arena;  // set while in use: a block keeps its arena
  std::function<void()> done;    // of a block over somebody else's memory: gives that back

  // Its places among the cached blocks; while in use it keeps the nodes, so that caching it again
  // allocates nothing.
  BlocksByAge age_node;
  BlocksByAge::iterator age;
  BlocksBySize::node_type size_node;
  BlocksBySize::iterator by_size;
};

void retain(Block* block);
void release(Block* block);

// Pages from the system, for the caller to munmap(). Neighbours share the huge page that one ends
// and the next begins in: a block of 7 MiB alone would take its last 1 MiB in pages of 4 KiB, and
// their faults cost a quarter of what reading the block costs. Of a huge page that is unmapped in
// part, the system takes the rest back when it needs memory.
class PageSource {
 public:
  PageSource() = default;
  ~PageSource();
  PageSource(const PageSource&) = delete;
  PageSource& operator=(const PageSource&) = delete;

  // `bytes` of whole pages, or nullptr.
  char* take(int64_t bytes);

 private:
  std::mutex mutex_;
  char* next_ = nullptr;   // not handed out yet
  char* ready_ = nullptr;  // accessible up to here
  char* end_ = nullptr;    // of the reserved addresses
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  // budget: most bytes of active and cached blocks together, < 0 for no limit.
  // max_cached: most bytes kept for reuse, < 0 for as many as were ever active at once.
  Arena(int64_t budget, Strategy strategy, int64_t max_cached);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A block of at least `bytes` with one reference. Throws OverBudget, std::bad_alloc.
  Block* acquire(int64_t bytes);
  // A block over memory that is not the arena's, charged to the budget with `charge` bytes until
  // its last reference goes; then `done` is called. Throws OverBudget.
  Block* borrow(char* data, int64_t bytes, int64_t charge, std::function<void()> done);
  // Unmap cached blocks, oldest first, until at most `keep` bytes are cached; bytes unmapped.
  int64_t trim(int64_t keep);
  // No block is handed out any more and none is kept; blocks in use live on until released.
  void close();
  Stats stats() const;
  Strategy strategy() const { return strategy_; }

  // What the last frame took, so that the next one starts with one piece of that size.
  std::atomic<int64_t> frame_hint{0};

  // The bytes of a block made for a request.
  static int64_t rounded(int64_t bytes);

 private:
  friend void release(Block* block);
  void give_back(Block* block);
  // Books a block of `size` bytes that does not come from the pool; the lock is held. Returns the
  // cached blocks that must go for it. Throws OverBudget.
  std::vector<Block*> charge(int64_t size);
  void count(int64_t bytes);
  // The oldest cached blocks beyond `keep` bytes, taken out of the books; the lock is held.
  std::vector<Block*> evict(int64_t keep);
  // Out of the books of cached blocks; the lock is held.
  void uncache(Block* block);
  void allocate(Block* block);
  static void destroy(Block* block);

  const int64_t budget_;
  const Strategy strategy_;
  const int64_t max_cached_;
  mutable std::mutex mutex_;
  PageSource pages_;
  BlocksByAge age_;  // cached blocks, oldest first
  BlocksBySize by_size_;
  Stats stats_;
  bool closed_ = false;
};

// Scratch memory that goes back as a whole: allocations are bumps of an offset in a few pieces.
// A piece that a tensor still uses when the frame closes stays until that tensor dies.
class Frame {
 public:
  explicit Frame(std::shared_ptr<Arena> arena, int64_t size_hint);
  ~Frame() { close(); }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

  // The piece that holds the allocation, with a reference for the caller, and the address.
  Block* acquire(int64_t bytes, char** data);
  void close();

 private:
  std::shared_ptr<Arena> arena_;
  std::mutex mutex_;
  std::vector<Block*> pieces_;
  int64_t offset_ = 0;  // in the last piece
  int64_t used_ = 0;    // in all pieces
  int64_t next_size_;
  bool closed_ = false;
};

}  // namespace mkrs::memory
