// Library: what every library can be asked, whatever kernels it holds.

#include "parallel.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

// Writes the name of the level that this library was compiled for, ended by a zero; room: at least 32 characters.
KERNEL void poolhouse_level(char* room) {
    const char* name = TEXT(POOLHOUSE_LEVEL);
    while ((*room++ = *name++)) {}
}

// Writes how many of `count` turns ran into `done`, [count] bytes, each 1 where it ran once; to try the threads.
KERNEL void poolhouse_turns(uint8_t* done, int64_t count, int64_t threads) {
    parallel::each(count, threads, [=](int64_t turn) { done[turn] += 1; });
}
