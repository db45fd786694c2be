/* The header twice in one file, and in two files of one program (header_b.c), as C and as C++. */
#include "context_parallel.h"
#include "context_parallel.h"

uint32_t other_version(void);

int main(void) {
    return cp_version() == other_version() ? 0 : 1;
}
