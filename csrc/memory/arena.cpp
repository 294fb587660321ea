#include "memory/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace mkrs::memory {
namespace {

int64_t page_size() {
  static const int64_t size = sysconf(_SC_PAGESIZE);  // 16 KiB on Apple silicon
  return size;
}

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

void advise_huge(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  // An advice: kernels without huge pages refuse it and nothing is lost.
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

// Pages from the start of a huge page on, or nullptr.
char* map_aligned(int64_t bytes, int protection) {
  // Map a huge page more than needed and cut the ends off.
  const int64_t length = bytes + kHugePage;
  void* found = mmap(nullptr, length, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(found);
  char* data = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(begin), kHugePage));
  char* end = begin + length;
  if (data > begin) munmap(begin, data - begin);
  if (end > data + bytes) munmap(data + bytes, end - (data + bytes));
  advise_huge(data, bytes);
  return data;
}

}  // namespace

PageSource::~PageSource() {
  if (next_ < end_) munmap(next_, end_ - next_);
}

char* PageSource::take(int64_t bytes) {
  const int protection = PROT_READ | PROT_WRITE;
  if (bytes >= kPackedBytes) return map_aligned(bytes, protection);
  std::lock_guard<std::mutex> lock(mutex_);
  if (end_ - next_ < bytes) {
    if (next_ < end_) munmap(next_, end_ - next_);
    // Without access it counts against no limit but that of the address space.
    next_ = ready_ = map_aligned(kReserved, PROT_NONE);
    end_ = next_ == nullptr ? nullptr : next_ + kReserved;
    if (next_ == nullptr) return map_aligned(bytes, protection);
  }
  // Up to a huge page's end: a part of one would be faulted in small pages.
  char* wanted = next_ + bytes;
  if (wanted > ready_) {
    char* ready = ready_ + round_up(wanted - ready_, kHugePage);
    if (mprotect(ready_, ready - ready_, protection) != 0) return nullptr;
    ready_ = ready;
  }
  char* data = next_;
  next_ = wanted;
  return data;
}

void retain(Block* block) {
  block->refs.fetch_add(1, std::memory_order_relaxed);
}

void release(Block* block) {
  if (block->refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  // The block may hold the last reference to its arena; keep it through give_back().
  const std::shared_ptr<Arena> arena = std::move(block->arena);
  arena->give_back(block);
}

Arena::Arena(int64_t budget, Strategy strategy, int64_t max_cached)
    : budget_(budget), strategy_(strategy), max_cached_(max_cached) {}

Arena::~Arena() {
  // Blocks in use hold the arena, so only cached ones are left.
  while (!age_.empty()) {
    Block* block = age_.front();
    uncache(block);
    destroy(block);
  }
}

int64_t Arena::rounded(int64_t bytes) {
  const int64_t page = page_size();
  if (bytes <= 0) return kAlignment;
  return bytes < page ? round_up(bytes, kAlignment) : round_up(bytes, page);
}

Block* Arena::acquire(int64_t bytes) {
  const int64_t size = rounded(bytes);
  std::vector<Block*> evicted;
  Block* block = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) throw std::runtime_error("the arena must be open, got a closed one");
    // Bounded waste: a block of the pool may be a little larger than the request, never double.
    const auto found = by_size_.lower_bound(size);
    const int64_t least = std::max(bytes, kAlignment);
    const int64_t limit = std::min(2 * least, least + 2 * page_size());
    if (found != by_size_.end() && (found->first == size || found->first < limit)) {
      block = found->second;
      uncache(block);
      stats_.active += block->size;
      ++stats_.hits;
    } else {
      evicted = charge(size);
    }
    count(bytes);
  }
  for (Block* old : evicted) destroy(old);
  if (block == nullptr) {
    block = new (std::nothrow) Block;
    if (block != nullptr) {
      block->size = size;
      allocate(block);
    }
    if (block == nullptr || block->data == nullptr) {
      delete block;
      std::lock_guard<std::mutex> lock(mutex_);
      stats_.active -= size;
      stats_.requested -= bytes;
      --stats_.allocations;
      --stats_.live;
      throw std::bad_alloc();
    }
  }
  block->requested = bytes;
  block->refs.store(1, std::memory_order_relaxed);
  block->arena = shared_from_this();
  return block;
}

Block* Arena::borrow(char* data, int64_t bytes, int64_t size, std::function<void()> done) {
  std::vector<Block*> evicted;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) throw std::runtime_error("the arena must be open, got a closed one");
    evicted = charge(size);
    count(bytes);
  }
  for (Block* old : evicted) destroy(old);
  Block* block = new Block;
  block->data = data;
  block->size = size;
  block->requested = bytes;
  block->refs.store(1, std::memory_order_relaxed);
  block->arena = shared_from_this();
  block->done = std::move(done);
  return block;
}

std::vector<Block*> Arena::charge(int64_t size) {
  if (budget_ >= 0 && stats_.active + size > budget_) {
    throw OverBudget("needs " + std::to_string(size) + " bytes more than the " +
                     std::to_string(stats_.active) + " in use, and the budget is " +
                     std::to_string(budget_) + " bytes");
  }
  std::vector<Block*> evicted;
  if (budget_ >= 0) evicted = evict(budget_ - stats_.active - size);
  stats_.active += size;
  return evicted;
}

void Arena::count(int64_t bytes) {
  stats_.peak = std::max(stats_.peak, stats_.active);
  stats_.reserved_peak = std::max(stats_.reserved_peak, stats_.active + stats_.cached);
  stats_.requested += bytes;
  ++stats_.allocations;
  ++stats_.live;
}

void Arena::give_back(Block* block) {
  std::vector<Block*> evicted;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.active -= block->size;
    stats_.requested -= block->requested;
    --stats_.live;
    if (closed_ || strategy_ == Strategy::None || block->done) {
      evicted.push_back(block);
    } else {
      if (block->size_node.empty()) {
        block->age_node.push_back(block);
        block->by_size = by_size_.emplace(block->size, block);
      } else {
        block->by_size = by_size_.insert(std::move(block->size_node));
      }
      age_.splice(age_.end(), block->age_node);
      block->age = std::prev(age_.end());
      stats_.cached += block->size;
      evicted = evict(max_cached_ >= 0 ? max_cached_ : stats_.peak);
    }
  }
  for (Block* old : evicted) destroy(old);
}

std::vector<Block*> Arena::evict(int64_t keep) {
  std::vector<Block*> evicted;
  while (stats_.cached > std::max<int64_t>(keep, 0)) {
    evicted.push_back(age_.front());
    uncache(age_.front());
  }
  return evicted;
}

void Arena::uncache(Block* block) {
  block->age_node.splice(block->age_node.begin(), age_, block->age);
  block->size_node = by_size_.extract(block->by_size);
  stats_.cached -= block->size;
}

int64_t Arena::trim(int64_t keep) {
  std::vector<Block*> evicted;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    evicted = evict(keep);
  }
  int64_t bytes = 0;
  for (Block* block : evicted) {
    bytes += block->size;
    destroy(block);
  }
  return bytes;
}

void Arena::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  trim(0);
}

Stats Arena::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void Arena::allocate(Block* block) {
  block->mapped = block->size >= kMapBytes;
  if (block->mapped) {
    block->data = pages_.take(block->size);
    return;
  }
  const int64_t alignment = block->size >= page_size() ? page_size() : kAlignment;
  void* data = nullptr;
  if (posix_memalign(&data, alignment, block->size) == 0) block->data = static_cast<char*>(data);
}

void Arena::destroy(Block* block) {
  if (block->done) {
    block->done();
  } else if (block->mapped) {
    munmap(block->data, block->size);
  } else {
    std::free(block->data);
  }
  delete block;
}

Frame::Frame(std::shared_ptr<Arena> arena, int64_t size_hint)
    : arena_(std::move(arena)),
      next_size_(std::max({size_hint, arena_->frame_hint.load(), kMinFrameChunk})) {}

Block* Frame::acquire(int64_t bytes, char** data) {
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kAlignment);
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw std::runtime_error("the frame must be open, got a closed one");
  if (pieces_.empty() || offset_ + size > pieces_.back()->size) {
    const int64_t wanted = std::max(size, next_size_);
    Block* piece = nullptr;
    try {
      piece = arena_->acquire(wanted);
    } catch (const OverBudget&) {
      if (wanted == size) throw;
      piece = arena_->acquire(size);  // room to grow is a wish, not a need
    }
    pieces_.push_back(piece);
    offset_ = 0;
    next_size_ = 2 * piece->size;
  }
  Block* piece = pieces_.back();
  *data = piece->data + offset_;
  offset_ += size;
  used_ += size;
  retain(piece);
  return piece;
}

void Frame::close() {
  std::vector<Block*> pieces;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    pieces.swap(pieces_);
    arena_->frame_hint.store(used_);
  }
  for (Block* piece : pieces) release(piece);
}

}  // namespace mkrs::memory
