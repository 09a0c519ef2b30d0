// Scratch: memory of one thread, kept from call to call and never larger than the largest of them.

#pragma once

#include <cstdlib>

struct Scratch {
    char* memory = nullptr;
    size_t size = 0;

    ~Scratch() { std::free(memory); }
    // Of 64 bytes' alignment; what stood there is lost.
    char* of(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = static_cast<char*>(std::aligned_alloc(64, size));
            if (memory == nullptr) std::abort();
        }
        return memory;
    }
};
