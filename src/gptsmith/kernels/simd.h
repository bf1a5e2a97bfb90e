/* Vectors of LANES floats or 32-bit integers, on the widest unit that the compiler was told of.

   + - * / < and & | ^ << >> are those of GCC and clang on vectors. A product and its sum are fused
   only where fma() says so (build with -ffp-contract=off): what one row computes alone and among
   others is then the same operation in the same order. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Before loops over a few registers: they must be unrolled, or the registers become memory. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
/* the same in memory, at any address */
typedef vf vf_at __attribute__((may_alias, aligned(4)));
typedef vi vi_at __attribute__((may_alias, aligned(4)));
typedef vh vh_at __attribute__((may_alias, aligned(2)));
typedef int32_t int_at __attribute__((may_alias, aligned(2)));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x - (vi){0}; }
INLINE vf load(const float *p) { return *(const vf_at *)p; }
INLINE void store(float *p, vf x) { *(vf_at *)p = x; }
INLINE vi load_int(const void *p) { return *(const vi_at *)p; }

#if defined(__AVX512F__)
INLINE vf fma_(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf max_(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min_(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf fma_(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf max_(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min_(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__ARM_NEON)
INLINE vf fma_(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vf max_(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vf min_(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf fma_(vf a, vf b, vf c) { return a * b + c; }
INLINE vf max_(vf a, vf b) { vi m = a > b; return (vf)((m & (vi)a) | (~m & (vi)b)); }
INLINE vf min_(vf a, vf b) { vi m = a < b; return (vf)((m & (vi)a) | (~m & (vi)b)); }
#endif

/* bfloat16 is the upper half of a float. */
INLINE vf load_bf16(const uint16_t *p) {
#if LANES == 16 /* compilers make two halves of a conversion */
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#elif LANES == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#else
    return (vf)(__builtin_convertvector(*(const vh_at *)p, vi) << 16);
#endif
}
INLINE uint16_t to_bf16(float x) { /* to nearest, ties to even; never for NaN */
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE void store_bf16(uint16_t *p, vf x) {
#if defined(__AVX512BF16__)
    *(vh_at *)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vi u = (vi)x;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    *(vh_at *)p = __builtin_convertvector(u & 0xffff, vh);
#endif
}
INLINE float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* What pairs of bf16 are multiplied by: bf16 where the CPU multiplies those, else floats. */
#if defined(__AVX512BF16__)
typedef uint16_t factor __attribute__((may_alias));
INLINE void store_factors(factor *p, vf x) { store_bf16((uint16_t *)p, x); }
/* Each lane of s plus its two numbers in `pairs`, times x[0] and x[1]. */
INLINE vf dot_pairs(vf s, vi pairs, const factor *x) {
    return (vf)_mm512_dpbf16_ps((__m512)s, (__m512bh)pairs, (__m512bh)splat_int(*(const int_at *)x));
}
#else
typedef float factor __attribute__((may_alias));
INLINE void store_factors(factor *p, vf x) { store((float *)p, x); }
INLINE vf dot_pairs(vf s, vi pairs, const factor *x) {
    s = fma_((vf)(pairs << 16), splat(x[0]), s);
    return fma_((vf)(pairs & (int32_t)0xffff0000), splat(x[1]), s);
}
#endif

/* The nearest integer, ties to even, of |x| < 2^22: adding 1.5 * 2^23 pushes the fraction out. */
INLINE vi round_int(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* Sums and maxima over the lanes, as a tree of fixed shape. Of 16 lanes the compiler chooses it
   (_mm512_reduce_*), once for a library. */
INLINE float sum_lanes(vf x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float a[LANES];
    store(a, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
#endif
}
INLINE float max_lanes(vf x) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float a[LANES];
    store(a, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
    return a[0];
#endif
}

/* e^x within 2 units in the last place; 0 below -87 (float's smallest normal is near), so that
   exp of minus infinity is 0 exactly. Cephes' polynomial (expf, Moshier 1992). */
INLINE vf exp_(vf x) {
    vi keep = x > -87.0f;
    x = min_(max_(x, splat(-87.0f)), splat(88.0f));
    vi n = round_int(x * 1.44269504088896341f);
    vf f = to_float(n);
    vf r = fma_(f, splat(-0.693359375f), x);
    r = fma_(f, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    p = fma_(p, r * r, r) + 1.0f;
    return (vf)((vi)(p * (vf)((n + 127) << 23)) & keep);
}
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp_(-x)); }

/* Abramowitz & Stegun 7.1.26, |error| <= 1.5e-7. */
INLINE vf erf_(vf x) {
    vi sign = (vi)x & (int32_t)0x80000000;
    vf a = (vf)((vi)x ^ sign);
    vf t = 1.0f / fma_(a, splat(0.3275911f), splat(1.0f));
    vf p = splat(1.061405429f);
    p = fma_(p, t, splat(-1.453152027f));
    p = fma_(p, t, splat(1.421413741f));
    p = fma_(p, t, splat(-0.284496736f));
    p = fma_(p, t, splat(0.254829592f));
    vf y = 1.0f - p * t * exp_(-a * a);
    return (vf)((vi)y | sign);
}

/* Four products of bytes per lane, added to a 32-bit sum, exactly. dot_int8: weights are stored as
   w + 128. Where the unit multiplies unsigned by signed bytes, the sum begins with -128 times the
   sum of x; elsewhere the stored byte is made signed. dot_int4: stored as w + 8, below 16. */
#if defined(__AVX512VNNI__) && LANES == 16
#define INT8_OFFSET 128
INLINE vi dot_int8(vi s, vi w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)s, (__m512i)w, (__m512i)x); }
#define dot_int4 dot_int8
#elif defined(__AVXVNNI__) && LANES == 8
#define INT8_OFFSET 128
INLINE vi dot_int8(vi s, vi w, vi x) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, (__m256i)x); }
#define dot_int4 dot_int8
#elif LANES == 8 /* sums of two products stay within 16 bits: 2 * 127 * 127 */
#define INT8_OFFSET 0
INLINE vi widen(vi s, __m256i pairs) {
    return s + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE vi dot_int8(vi s, vi w, vi x) {
    __m256i v = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8((char)0x80));
    return widen(s, _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8(v, (__m256i)x)));
}
INLINE vi dot_int4(vi s, vi w, vi x) { return widen(s, _mm256_maddubs_epi16((__m256i)w, (__m256i)x)); }
#elif defined(__ARM_FEATURE_DOTPROD)
#define INT8_OFFSET 0
INLINE vi dot_int4(vi s, vi w, vi x) { return (vi)vdotq_s32((int32x4_t)s, (int8x16_t)w, (int8x16_t)x); }
INLINE vi dot_int8(vi s, vi w, vi x) { return dot_int4(s, w ^ (int32_t)0x80808080, x); }
#else
#define INT8_OFFSET 128
INLINE vi dot_int8(vi s, vi w, vi x) {
    for (int shift = 0; shift < 32; shift += 8) s += ((w >> shift) & 255) * ((x << (24 - shift)) >> 24);
    return s;
}
#define dot_int4 dot_int8
#endif
