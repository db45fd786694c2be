// Tiles of 16-bit elements in shared memory: how they are laid out, filled from a tensor, and read as fragments of mma.m16n8k16.
//
// A row of COLS elements is COLS/8 chunks of 16 bytes. Chunk c of row r is stored in place of chunk c ^ x(r), so that the eight rows of one
// ldmatrix matrix, the same chunk of rows r … r+7, lie in different banks. With COLS a multiple of 64 a row starts in bank 0 and
// x(r) = r % 8; with COLS = 64·n + 32 every second row starts in bank 16 and x(r) = (r / 2) % 4.
//
//     COLS = 64      bank 0  4   8   12  16  20  24  28         COLS = 96      bank 0  4   8   12  16  20  24  28
//     row 0               0   1   2   3   4   5   6   7          row 0               0   1   2   3   4   5   6   7
//     row 1               1   0   3   2   5   4   7   6                              8   9  10  11 | 0   1   2   3   row 1
//     row 2               2   3   0   1   6   7   4   5                              4   5   6   7   8   9  10  11
//     row 3               3   2   1   0   7   6   5   4          row 2               1   0   3   2   5   4   7   6
//     …                                                          …
#pragma once
#include "params.h"
#include "ptx.cuh"

template <int ROWS, int COLS>
struct Tile {
    static_assert(COLS % 32 == 0 && ROWS % 16 == 0, "");
    static constexpr int STRIDE = COLS * 2;                // bytes from row to row
    static constexpr int BYTES = ROWS * STRIDE;            // a multiple of 128; tiles start at multiples of 128
    static constexpr int GROUP = COLS % 64 == 0 ? 8 : 4;   // chunks that change places among each other
    static constexpr int GROUPS = COLS / 8 / GROUP;

    DEVICE static uint32_t swizzle(uint32_t row) { return GROUP == 8 ? row % 8 : row / 2 % 4; }

    // Byte offset of chunk `chunk` (8 elements) of row `row`.
    DEVICE static uint32_t offset(uint32_t row, uint32_t chunk) { return row * STRIDE + (chunk ^ swizzle(row)) * 16; }

    // Byte offset of elements `col`, `col`+1, col even: where a lane puts two neighbours of an accumulator.
    DEVICE static uint32_t offset2(uint32_t row, uint32_t col) { return offset(row, col / 8) + col % 8 * 2; }

    // Fragments are the 16×16 blocks (block row i, block column k) from row `row` on, a multiple of 16. A lane computes its place in block
    // (0, 0) once, with one of the two functions below; place() of another block is then one XOR, often shared, and a constant.
    //
    //     lane_across: matrices  0 2   first the 8 rows below, then the 8 columns beside     load_a, load_b_trans
    //                            1 3
    //     lane_down:   matrices  0 1   first the 8 columns beside, then the 8 rows below     load_b, load_a_trans
    //                            2 3
    DEVICE static uint32_t lane_across(uint32_t row, uint32_t lane) { return offset(row + lane % 16, lane / 16); }
    DEVICE static uint32_t lane_down(uint32_t row, uint32_t lane) { return offset(row + lane % 8 + lane / 16 * 8, lane / 8 % 2); }
    DEVICE static uint32_t place(uint32_t lane, int i, int k) {
        return (lane ^ (k % (GROUP / 2) * 32)) + (k / (GROUP / 2) * GROUP * 16 + i * 16 * STRIDE);
    }

    // A (16×16): block (i, k) of a tile that holds A[m][k].
    DEVICE static void load_a(uint32_t (&a)[4], const unsigned char* tile, uint32_t across, int i, int k) {
        ldmatrix_x4(a, tile + place(across, i, k));
    }
    // A (16×16) of a tile that holds A transposed, [k][m]: block (k, m).
    DEVICE static void load_a_trans(uint32_t (&a)[4], const unsigned char* tile, uint32_t down, int k, int m) {
        ldmatrix_x4_trans(a, tile + place(down, k, m));
    }
    // B (16×16, two n8 halves: b[0], b[1] and b[2], b[3]) of a tile that holds [n][k]: block (n, k).
    DEVICE static void load_b(uint32_t (&b)[4], const unsigned char* tile, uint32_t down, int n, int k) {
        ldmatrix_x4(b, tile + place(down, n, k));
    }
    // The same of a tile that holds [k][n]: block (k, n).
    DEVICE static void load_b_trans(uint32_t (&b)[4], const unsigned char* tile, uint32_t across, int k, int n) {
        ldmatrix_x4_trans(b, tile + place(across, k, n));
    }
};

// Element offset of (row, head, 0) in a tensor.
DEVICE int64_t element_offset(const cp_view& view, uint32_t row, uint32_t head) {
    int64_t offset = head * view.stride_head;
    if (view.rows_per_batch != 0) {
        uint32_t batch = row / view.rows_per_batch;
        offset += batch * view.stride_batch;
        row -= batch * view.rows_per_batch;
    }
    return offset + row * view.stride_row;
}

// Bit of a row in a bitmap of used rows; and whether all of ROWS rows from `first` on have it.
DEVICE bool is_used(uint64_t bitmap, uint32_t row) { return load_constant((const uint32_t*)bitmap + row / 32) >> (row % 32) & 1; }
template <int ROWS>
DEVICE bool all_used(uint64_t bitmap, uint32_t first) {
    const uint32_t last = first + ROWS - 1;
    uint32_t missing = 0;
#pragma unroll
    for (uint32_t i = 0; i < ROWS / 32 + 1; i++) {  // words, the last one perhaps twice
        const uint32_t word = min(first / 32 + i, last / 32);
        uint32_t mask = word == first / 32 ? 0xffffffffu << (first % 32) : 0xffffffffu;
        mask &= word == last / 32 ? 0xffffffffu >> (31 - last % 32) : 0xffffffffu;
        missing |= ~load_constant((const uint32_t*)bitmap + word) & mask;
    }
    return missing == 0;
}

// Fills tiles from consecutive rows of one head of a tensor, THREADS threads together, each always the same chunks of every PASS-th row.
// Asynchronous: the caller commits, waits and synchronises.
template <int ROWS, int COLS, int THREADS>
struct TileLoader {
    using Shape = Tile<ROWS, COLS>;
    static constexpr int PASS = THREADS / Shape::GROUP;  // rows of one pass; neighbouring threads read 128 (or 64) bytes in a row
    static constexpr int CHUNK = 16, STEP = Shape::GROUP * CHUNK;
    static_assert(ROWS % PASS == 0 && PASS % 8 == 0, "the swizzle of a thread's rows must be the same");

    const unsigned char* at = nullptr;  // of the thread's first chunk in its next row

    // The first row will be `next` of head `head`. thread < THREADS.
    DEVICE void start(const cp_view& view, uint32_t head, uint32_t next, uint32_t thread) {
        const uint32_t row = next + thread / Shape::GROUP;
        at = (const unsigned char*)view.ptr + element_offset(view, row, head) * 2 + thread % Shape::GROUP * CHUNK;
    }

    // Rows next … next+ROWS, which follow those before: those below `end` (and `used`, unless null) with their first `dim` columns; everything
    // else becomes zero. dim is a multiple of 8. Nothing else is read, so `end` may be anywhere.
    DEVICE void load(unsigned char* tile, const cp_view& view, uint32_t next, uint32_t end, uint64_t used, uint32_t dim, uint32_t thread) {
        tile += Shape::offset(thread / Shape::GROUP, thread % Shape::GROUP);
        const int64_t pass = view.stride_row * (PASS * 2);
        // Rows to the end of the batch entry of the thread's next row, itself included.
        int32_t left = view.rows_per_batch == 0 ? 0 : (int32_t)(view.rows_per_batch - (next + thread / Shape::GROUP) % view.rows_per_batch);
        const bool together = view.rows_per_batch == 0 || left > ROWS - PASS;  // the thread's rows are in one entry
        if (together && next + ROWS <= end && dim == COLS && (used == 0 || all_used<ROWS>(used, next))) {
#pragma unroll
            for (int r = 0; r < ROWS; r += PASS) {
#pragma unroll
                for (int g = 0; g < Shape::GROUPS; g++) {
                    cp_async_16(tile + r * Shape::STRIDE + g * STEP, at + g * STEP, true);
                }
                at += pass;
            }
            left -= ROWS;
            wrap(view, left);
        } else {
#pragma unroll 1
            for (uint32_t row = next + thread / Shape::GROUP; row < next + ROWS; row += PASS) {
                const bool valid = row < end && (used == 0 || is_used(used, row));
#pragma unroll
                for (int g = 0; g < Shape::GROUPS; g++) {
                    cp_async_16(tile + g * STEP, at + g * STEP, valid && (thread % Shape::GROUP + g * Shape::GROUP) * 8 < dim);
                }
                tile += PASS * Shape::STRIDE;
                at += pass;
                left -= PASS;
                wrap(view, left);
            }
        }
    }

    // From the end of a batch entry to the next.
    DEVICE void wrap(const cp_view& view, int32_t& left) {
        if (view.rows_per_batch != 0) {
#pragma unroll 1
            while (left <= 0) {
                left += view.rows_per_batch;
                at += (view.stride_batch - view.rows_per_batch * view.stride_row) * 2;
            }
        }
    }
};
