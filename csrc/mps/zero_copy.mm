// Metal buffers over pages that are mapped already: the only Objective-C, because torch's C shim
// has nothing for it.
#include "mps/share_mapped.h"

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

namespace mkrs::mps {
namespace {

// The GPU that torch uses: the system's default one.
id<MTLDevice> metal_device() {
  static id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  return device;
}

}  // namespace

int64_t longest_buffer() {
  return metal_device() == nil ? 0 : static_cast<int64_t>([metal_device() maxBufferLength]);
}

void* buffer_over(void* pages, size_t length) {
  id<MTLBuffer> buffer = [metal_device() newBufferWithBytesNoCopy:pages
                                                           length:length
                                                          options:MTLResourceStorageModeShared
                                                      deallocator:nil];
  return (__bridge_retained void*)buffer;
}

void release_buffer(void* buffer) {
  id<MTLBuffer> owned = (__bridge_transfer id<MTLBuffer>)buffer;
  (void)owned;
}

}  // namespace mkrs::mps
