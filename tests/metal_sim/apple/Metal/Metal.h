// Declarations that stand for Apple's header in the macOS compile check: what csrc/mps/*.mm uses,
// with the signatures of Apple's documentation.
#pragma once
#import <Foundation/Foundation.h>

typedef NSUInteger MTLResourceOptions;
enum : NSUInteger { MTLResourceStorageModeShared = 0 };

@protocol MTLBuffer <NSObject>
- (void*)contents;
- (NSUInteger)length;
@end

@protocol MTLDevice <NSObject>
- (NSUInteger)maxBufferLength;
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void* pointer, NSUInteger length))deallocator;
@end

extern "C" id<MTLDevice> MTLCreateSystemDefaultDevice(void);
