// Declarations that stand for Apple's header in the macOS compile check; never part of a build.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef unsigned long NSUInteger;
typedef long NSInteger;

#define nil nullptr

__attribute__((objc_root_class)) @interface NSObject
@end
@protocol NSObject
@end
