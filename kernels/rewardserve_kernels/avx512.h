// What the C++ for CPUs with bf16 dot products (AVX512_BF16) has in common.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using bf16 = uint16_t;

constexpr int LANES = 16;  // fp32 in a register, or pairs of bf16
constexpr float LOG2E = 1.44269504088896341f;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// 2^x, NaN for NaN. Relative error below 3e-7, and 0 below 2^-126: a result with fewer bits (denormal) costs an Intel CPU
// hundreds of cycles, which made attention half as fast, since keys that are not seen are -inf. Of +inf, x - whole is
// NaN, and scalef makes inf of that: what the logistic function of a very negative number needs.
inline __m512 exp2(__m512 x) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // of a NaN too
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.320285999e-3f);  // the least greatest error on [-1/2, 1/2] of those that are 1 at 0
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.674952837e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.551047799e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022165982e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314659563e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(normal, p, whole);
}

inline __m512 tanh(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(15.0f), x);  // 1 from there on
    const __m512 e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2E)));
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

}  // namespace
