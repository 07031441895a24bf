// Tree attention for CPUs with bf16 dot products (AVX512_BF16), on matrix units where there are some (amx.h). Built and
// called by avx512.py.
//
// The way of flash attention (arXiv 2205.14135, algorithm 1): for a tile of query rows one block of keys after the
// other, with a running maximum and sum for every row, so that no more than [TILE, BLOCK] scores exist at a time. Scores
// and sums are fp32; the factors of both products are bf16.
//
// Batch invariance. Blocks of keys lie at absolute positions, keys that a row does not see have the weight 0 exactly,
// and no operation mixes rows. So what a row gets does not depend on the rows beside it, on where its sequence was cut,
// or on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>

#include "amx.h"
#include "avx512.h"

namespace {

constexpr int64_t BLOCK = 128;              // keys in a block of the pool, and at most in one product
constexpr int64_t PANEL = 4 * LANES;        // columns of a product that are in registers at a time
constexpr int ROWS = 6;                     // rows of a product that are in registers at a time: 24 of 32 for sums
constexpr int64_t TILE = 4 * ROWS;          // rows that go over a block of keys while it lies in the first cache
static_assert(PAIR > TILE, "buffers are for as many as there are on matrix units");
constexpr int64_t WEIGHED = 2 * LANES;      // scores become weights by so many, a register of bf16
constexpr int64_t GATHERED = 8 * BLOCK;     // keys that are laid out at a time, for all rows of a chunk: second cache
constexpr float INF = std::numeric_limits<float>::infinity();

// c [R, 16 NV] = alpha * c + a b; a [R, 2 pairs], b [pairs, 16 NV, 2]. Without alpha c is overwritten.
template <int R, int NV>
inline void multiply(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t pairs, float* c,
                     int64_t c_stride, const float* alpha) {
    __m512 sums[R][NV];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NV; n++)
            sums[r][n] = alpha ? _mm512_mul_ps(_mm512_set1_ps(alpha[r]), _mm512_loadu_ps(c + r * c_stride + n * LANES))
                               : _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512bh columns[NV];
        for (int n = 0; n < NV; n++) columns[n] = (__m512bh)_mm512_loadu_si512(b + pair * b_stride + n * 2 * LANES);
        for (int r = 0; r < R; r++) {
            int32_t both;
            std::memcpy(&both, a + r * a_stride + 2 * pair, sizeof both);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
            for (int n = 0; n < NV; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], row, columns[n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NV; n++) _mm512_storeu_ps(c + r * c_stride + n * LANES, sums[r][n]);
}

template <int NV>
void multiply_rows(int64_t rows, const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t pairs,
                   float* c, int64_t c_stride, const float* alpha) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_stride, c += ROWS * c_stride, alpha += alpha ? ROWS : 0)
        multiply<ROWS, NV>(a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
    switch (rows) {
        case 5: return multiply<5, NV>(a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
        case 4: return multiply<4, NV>(a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
        case 3: return multiply<3, NV>(a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
        case 2: return multiply<2, NV>(a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
        case 1: return multiply<1, NV>(a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
    }
}

// `columns` is a multiple of LANES.
void multiply_all(int64_t rows, int64_t columns, const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride,
                  int64_t pairs, float* c, int64_t c_stride, const float* alpha) {
    for (; columns >= PANEL; columns -= PANEL, b += 2 * PANEL, c += PANEL)
        multiply_rows<4>(rows, a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
    switch (columns / LANES) {
        case 3: return multiply_rows<3>(rows, a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
        case 2: return multiply_rows<2>(rows, a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
        case 1: return multiply_rows<1>(rows, a, a_stride, b, b_stride, pairs, c, c_stride, alpha);
    }
}

// Rows and columns of sixteen registers of sixteen exchanged.
inline void transpose(__m512i r[LANES]) {
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace

extern "C" {

// As avx512.py declares it. Strides are in elements; the last axis is contiguous.
struct Tensors {
    const bf16 *q, *k, *v;           // [heads, rows, head_size], [kv_heads, rows, ...]
    int64_t q_head, q_row, k_head, k_row, v_head, v_row;
    const bf16 *pool_k, *pool_v;     // [blocks, kv_heads, BLOCK, ...], contiguous
    const float* sinks;              // [heads], or null
    bf16* out;                       // [rows, heads, v_head_size], contiguous
    int64_t heads, kv_heads, head_size, v_head_size, window;
    float scale, softcap;
};

// Rows of one segment: `rows` from `position` on, their queries from `q_row` on; `own_row` is the segment's first.
struct Part {
    int64_t q_row, rows, position, own_row;
};

// Parts of segments that continue one stored beginning of `start` tokens: one piece of work for each head.
struct Chunk {
    int64_t first_part, end_part, start, first_block;  // the latter in `blocks`
};
}

namespace {

struct Row {
    int64_t first_key, end_key;  // of those it sees
    bf16* out;
};

class Worker {
   public:
    Worker(const Tensors& t, int64_t max_rows)
        : t_(t),
          group_(t.heads / t.kv_heads),
          head_size_(t.head_size),
          v_size_(round_up(t.v_head_size, LANES)),
          on_tiles_(head_size_ % TILE_INNER == 0 && may_use_tiles()),
          rows_(new Row[max_rows]),
          q_(allocate<bf16>((max_rows + PAIR) * head_size_)),  // of the last tile all is read
          out_(allocate<float>(max_rows * v_size_)),
          maximum_(allocate<float>(max_rows)),
          sum_(allocate<float>(max_rows * LANES)),
          scores_(allocate<float>(PAIR * BLOCK)),
          weights_(allocate<bf16>(PAIR * BLOCK)),
          added_(allocate<float>(on_tiles_ ? PAIR * v_size_ : 0)),
          keys_(allocate<bf16>(GATHERED * head_size_)),
          values_(allocate<bf16>(GATHERED * v_size_)) {
        if (on_tiles_) tiles_.emplace();
    }

    void run(const Chunk& chunk, const Part* parts, const int64_t* blocks, int64_t kv_head) {
        kv_head_ = kv_head;
        blocks_ = blocks + chunk.first_block;
        start_ = chunk.start;
        int64_t num_rows = 0;
        for (int64_t i = chunk.first_part; i < chunk.end_part; i++) num_rows = take_queries(parts[i], num_rows);
        const int64_t shared = round_down(start_, BLOCK);  // keys before are the same for all parts
        over_keys(0, num_rows, 0, shared, 0);
        int64_t row = 0;
        for (int64_t i = chunk.first_part; i < chunk.end_part; i++) {
            const int64_t end = row + parts[i].rows * group_;
            over_keys(row, end, shared, parts[i].position + parts[i].rows, parts[i].own_row);
            row = end;
        }
        for (int64_t r = 0; r < num_rows; r++) finish(r);
    }

   private:
    template <typename T>
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    template <typename T>
    using Buffer = std::unique_ptr<T[], Free<T>>;
    template <typename T>
    static Buffer<T> allocate(int64_t count) {
        return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
    }

    int64_t take_queries(const Part& part, int64_t r) {
        for (int64_t i = 0; i < part.rows; i++)
            for (int64_t g = 0; g < group_; g++, r++) {
                const int64_t head = kv_head_ * group_ + g, row = part.q_row + i, position = part.position + i;
                std::memcpy(&q_[r * head_size_], t_.q + head * t_.q_head + row * t_.q_row, head_size_ * sizeof(bf16));
                rows_[r] = {t_.window ? std::max<int64_t>(0, position - t_.window + 1) : 0, position + 1,
                            t_.out + (row * t_.heads + head) * t_.v_head_size};
                maximum_[r] = t_.sinks ? t_.sinks[head] * LOG2E : -INF;
                const __mmask16 first = t_.sinks ? 1 : 0;  // a sink is a key with the weight 1 and no value
                _mm512_store_ps(&sum_[r * LANES], _mm512_maskz_mov_ps(first, _mm512_set1_ps(1.0f)));
                std::memset(&out_[r * v_size_], 0, v_size_ * sizeof(float));
            }
        return r;
    }

    // The block with the first key that any of rows [begin, end) sees. With a window that need not be the first row's:
    // where a new part begins, positions start anew.
    int64_t first_block_seen(int64_t begin, int64_t end) const {
        int64_t first = rows_[begin].first_key;
        for (int64_t row = begin + 1; row < end; row++) first = std::min(first, rows_[row].first_key);
        return round_down(first, BLOCK);
    }

    // Rows [begin, end) over keys [first_key, end_key); `first_key` is at the border of a block.
    void over_keys(int64_t begin, int64_t end, int64_t first_key, int64_t end_key, int64_t own_row) {
        for (int64_t key = std::max(first_key, first_block_seen(begin, end)); key < end_key; key += GATHERED) {
            const int64_t stop = std::min(end_key, key + GATHERED);
            gather(key, stop, own_row);
            const int64_t tile = on_tiles_ ? PAIR : TILE;
            for (int64_t row = begin; row < end; row += tile) over_tile(row, std::min(tile, end - row), key, stop);
        }
    }

    // Keys and values [key, stop) laid out for products, in blocks, with zeros after them to the end of a panel.
    void gather(int64_t key, int64_t stop, int64_t own_row) {
        for (int64_t block = key; block < stop; block += BLOCK) {
            const int64_t end = std::min(block + BLOCK, stop), stored = std::min(start_, end);
            const bf16 *keys[BLOCK], *values[BLOCK];
            for (int64_t p = block; p < stored; p++) {
                const int64_t slot = (blocks_[p / BLOCK] * t_.kv_heads + kv_head_) * BLOCK + p % BLOCK;
                keys[p - block] = t_.pool_k + slot * t_.head_size;
                values[p - block] = t_.pool_v + slot * t_.v_head_size;
            }
            for (int64_t p = std::max(start_, block); p < end; p++) {
                const int64_t row = own_row + p - start_;
                keys[p - block] = t_.k + kv_head_ * t_.k_head + row * t_.k_row;
                values[p - block] = t_.v + kv_head_ * t_.v_head + row * t_.v_row;
            }
            lay_out_keys(keys, end - block, &keys_[(block - key) * head_size_]);
            lay_out_values(values, end - block, &values_[(block - key) * v_size_]);
        }
    }

    // -> [head_size / 2, BLOCK, 2]
    void lay_out_keys(const bf16* const* rows, int64_t count, bf16* out) {
        for (int64_t key = 0; key < round_up(count, LANES); key += LANES)
            for (int64_t d = 0; d < head_size_; d += 2 * LANES) {
                const int64_t pairs = std::min<int64_t>(LANES, (head_size_ - d) / 2);
                const __mmask16 inside = (1u << pairs) - 1;
                __m512i r[LANES];
                for (int64_t i = 0; i < LANES; i++)
                    r[i] = key + i < count ? _mm512_maskz_loadu_epi32(inside, rows[key + i] + d) : _mm512_setzero_si512();
                transpose(r);
                for (int64_t i = 0; i < pairs; i++) _mm512_store_si512(out + ((d / 2 + i) * BLOCK + key) * 2, r[i]);
            }
        for (int64_t key = round_up(count, LANES); key < round_up(count, PANEL); key += LANES)
            for (int64_t d = 0; d < head_size_; d += 2)
                _mm512_store_si512(out + (d / 2 * BLOCK + key) * 2, _mm512_setzero_si512());
    }

    // -> [BLOCK / 2, v_size, 2]
    void lay_out_values(const bf16* const* rows, int64_t count, bf16* out) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        for (int64_t key = 0; key < round_up(count, PANEL); key += 2)
            for (int64_t d = 0; d < v_size_; d += LANES) {
                const __mmask16 inside = (1u << std::min<int64_t>(LANES, t_.v_head_size - d)) - 1;
                const __m256i zero = _mm256_setzero_si256();
                const __m256i even = key < count ? _mm256_maskz_loadu_epi16(inside, rows[key] + d) : zero;
                const __m256i odd = key + 1 < count ? _mm256_maskz_loadu_epi16(inside, rows[key + 1] + d) : zero;
                const __m512i both = _mm512_permutex2var_epi16(_mm512_castsi256_si512(even), low,
                                                               _mm512_castsi256_si512(odd));
                _mm512_store_si512(out + (key / 2 * v_size_ + d) * 2, both);
            }
    }

    void over_tile(int64_t row, int64_t count, int64_t first_key, int64_t end_key) {
        const int64_t first = std::max(first_key, first_block_seen(row, row + count));
        const int64_t end = std::min(end_key, rows_[row + count - 1].end_key);
        for (int64_t block = first; block < end; block += BLOCK) {
            const int64_t num_keys = round_up(std::min(BLOCK, end - block), WEIGHED);
            const bf16* keys = &keys_[(block - first_key) * head_size_];
            const bf16* values = &values_[(block - first_key) * v_size_];
            score(row, count, keys, num_keys);
            float alpha[PAIR];
            switch (num_keys / WEIGHED) {
                case 4: weigh<4>(row, count, block, alpha); break;
                case 3: weigh<3>(row, count, block, alpha); break;
                case 2: weigh<2>(row, count, block, alpha); break;
                case 1: weigh<1>(row, count, block, alpha); break;
            }
            add_values(row, count, values, num_keys, alpha);
        }
    }

    void score(int64_t row, int64_t count, const bf16* keys, int64_t num_keys) {
        const bf16* queries = &q_[row * head_size_];
        if (on_tiles_)
            multiply_on_tiles(count, num_keys, {queries, head_size_, TILE_INNER, TILE_ROWS * head_size_}, keys, 2 * BLOCK,
                              head_size_, scores_.get(), BLOCK);
        else
            multiply_all(count, num_keys, queries, head_size_, keys, 2 * BLOCK, head_size_ / 2, scores_.get(), BLOCK,
                         nullptr);
    }

    // Former results times alpha, and the block's values by their weights.
    void add_values(int64_t row, int64_t count, const bf16* values, int64_t num_keys, const float* alpha) {
        float* out = &out_[row * v_size_];
        if (!on_tiles_)
            return multiply_all(count, v_size_, weights_.get(), BLOCK, values, 2 * v_size_, num_keys / 2, out, v_size_,
                                alpha);
        multiply_on_tiles(count, v_size_, {weights_.get(), BLOCK, TILE_INNER, TILE_ROWS * BLOCK}, values, 2 * v_size_,
                          num_keys, added_.get(), v_size_);
        for (int64_t i = 0; i < count; i++)  // a tile holds other rows after the last one, whose results are not touched
            for (int64_t d = i * v_size_; d < (i + 1) * v_size_; d += LANES)
                _mm512_store_ps(out + d, _mm512_fmadd_ps(_mm512_load_ps(out + d), _mm512_set1_ps(alpha[i]),
                                                         _mm512_load_ps(&added_[d])));
    }

    // Scores [count, 32 PIECES] -> weights, relative to the greatest score of each row so far; what former results are to
    // be multiplied with.
    template <int PIECES>
    void weigh(int64_t row, int64_t count, int64_t block, float* alpha) {
        if (t_.softcap) cap<PIECES>(count);
        const float scale = t_.softcap ? 1.0f : t_.scale * LOG2E;
        alignas(64) float greatest[PAIR] = {};
        for (int64_t i = 0; i < count; i++) greatest[i] = _mm512_reduce_max_ps(greatest_of<PIECES>(row + i, i, block));
        for (int64_t i = 0; i < count; i += LANES) {
            const __mmask16 inside = upto(count - i);
            const __m512 before = _mm512_mask_loadu_ps(_mm512_setzero_ps(), inside, &maximum_[row + i]);
            const __m512 now = _mm512_max_ps(before, _mm512_mul_ps(_mm512_load_ps(greatest + i), _mm512_set1_ps(scale)));
            _mm512_mask_storeu_ps(&maximum_[row + i], inside, now);
            const __mmask16 nothing = _mm512_cmp_ps_mask(now, _mm512_set1_ps(-INF), _CMP_EQ_OQ);
            const __m512 subtract = _mm512_mask_mov_ps(now, nothing, _mm512_setzero_ps());
            _mm512_store_ps(greatest + i, subtract);
            _mm512_storeu_ps(alpha + i, exp2(_mm512_sub_ps(before, subtract)));  // 0 if there was nothing before
        }
        for (int64_t i = 0; i < count; i++) {
            const __m512 sum = exponents<PIECES>(row + i, i, block, scale, greatest[i]);
            float* total = &sum_[(row + i) * LANES];
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), _mm512_set1_ps(alpha[i]), sum));
        }
    }

    template <int PIECES>
    void cap(int64_t count) {
        const __m512 scale = _mm512_set1_ps(t_.scale / t_.softcap), cap = _mm512_set1_ps(t_.softcap * LOG2E);
        for (int64_t i = 0; i < count; i++)
            for (int n = 0; n < 2 * PIECES; n++) {
                float* scores = &scores_[i * BLOCK + n * LANES];
                _mm512_store_ps(scores, _mm512_mul_ps(tanh(_mm512_mul_ps(_mm512_load_ps(scores), scale)), cap));
            }
    }

    // Which of keys [key, key + 16) of the block a row sees.
    static __mmask16 seen(const Row& row, int64_t key) { return upto(row.end_key - key) & ~upto(row.first_key - key); }

    static bool sees_all(const Row& row, int64_t block, int64_t num_keys) {
        return row.first_key <= block && row.end_key >= block + num_keys;
    }

    template <int PIECES>
    __m512 greatest_of(int64_t row, int64_t i, int64_t block) const {
        const float* scores = &scores_[i * BLOCK];
        const bool whole = sees_all(rows_[row], block, PIECES * WEIGHED);
        __m512 greatest[2];
        for (int n = 0; n < 2 * PIECES; n++) {
            __m512 x = _mm512_load_ps(scores + n * LANES);
            if (!whole) x = _mm512_mask_mov_ps(_mm512_set1_ps(-INF), seen(rows_[row], block + n * LANES), x);
            greatest[n % 2] = n < 2 ? x : _mm512_max_ps(greatest[n % 2], x);
        }
        return _mm512_max_ps(greatest[0], greatest[1]);
    }

    // Of one row; their sum.
    template <int PIECES>
    __m512 exponents(int64_t row, int64_t i, int64_t block, float scale, float subtract) {
        const float* scores = &scores_[i * BLOCK];
        const bool whole = sees_all(rows_[row], block, PIECES * WEIGHED);
        const __m512 factor = _mm512_set1_ps(scale), less = _mm512_set1_ps(subtract);
        __m512 sum = _mm512_setzero_ps();
        for (int n = 0; n < 2 * PIECES; n += 2) {
            __m512 two[2];
            for (int m = 0; m < 2; m++) {
                const __m512 x = _mm512_load_ps(scores + (n + m) * LANES);
                two[m] = exp2(_mm512_fmsub_ps(x, factor, less));
                if (!whole) two[m] = _mm512_maskz_mov_ps(seen(rows_[row], block + (n + m) * LANES), two[m]);
            }
            sum = _mm512_add_ps(sum, _mm512_add_ps(two[0], two[1]));
            _mm512_store_si512(&weights_[i * BLOCK + n * LANES], (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0]));
        }
        return sum;
    }

    static __mmask16 upto(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

    void finish(int64_t row) {
        const __m512 sum = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(&sum_[row * LANES])));
        for (int64_t d = 0; d < t_.v_head_size; d += LANES) {
            const __mmask16 inside = upto(t_.v_head_size - d);
            const __m512 out = _mm512_mul_ps(_mm512_load_ps(&out_[row * v_size_ + d]), sum);
            _mm256_mask_storeu_epi16(rows_[row].out + d, inside, (__m256i)_mm512_cvtneps_pbh(out));
        }
    }

    const Tensors& t_;
    const int64_t group_, head_size_, v_size_;
    const bool on_tiles_;
    int64_t kv_head_ = 0, start_ = 0;
    const int64_t* blocks_ = nullptr;
    std::unique_ptr<Row[]> rows_;
    Buffer<bf16> q_;
    Buffer<float> out_, maximum_, sum_, scores_;
    Buffer<bf16> weights_;
    Buffer<float> added_;
    Buffer<bf16> keys_, values_;
    std::optional<Tiles> tiles_;
};

}  // namespace

extern "C" void tree_attention(const Tensors* tensors, const Chunk* chunks, int64_t num_chunks, const Part* parts,
                               const int64_t* blocks, int64_t max_rows, int num_threads) {
    const int64_t num_tasks = num_chunks * tensors->kv_heads;
#pragma omp parallel num_threads(num_threads)
    {
        Worker worker(*tensors, max_rows * (tensors->heads / tensors->kv_heads));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < num_tasks; task++)
            worker.run(chunks[task / tensors->kv_heads], parts, blocks, task % tensors->kv_heads);
    }
}
