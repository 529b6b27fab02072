// How many floats a vector of this CPU holds. gcc keeps wider ones, which it offers too, in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
