/* Causal n-gram state over a stream of token ids: which token has followed the last `width` tokens most
 * often, in what share of their occurrences, and how often such hints came true. The token expert of the
 * published tilt.
 *
 * Entry i of a feed belongs to the token after the i-th fed one and is computed from the tokens up to and
 * including the i-th (C1). Counts change only when a token is fed (C3), so the state cannot know more than
 * a decoder does.
 *
 * Restarts. Contexts never reach back past the last restart: the first `width` tokens after it are context
 * alone, neither hinted nor counted. So rows of targets of several documents can take turns, each fed after
 * the context of its first target, which is stored once more but not counted again.
 *
 * Contexts. `slots` is an open-addressing table with linear probing, 8 bytes a slot, at most 3/4 full. The
 * upper half of a slot is the 32-bit hash of the context, whose leading bits are its home; the lower half
 * says where the context stands: once seen, the position of its continuation in `tokens`; seen again, OFTEN
 * plus its index in `contexts`. Equal hashes only nominate a slot: it counts as found when all `width`
 * tokens before that position equal the present ones. So hints, gates and odds are exact for every stream;
 * a poor hash would cost time, never a wrong count.
 *
 * Continuations. The count of the most frequent one is kept in its context, the counts of the others in
 * `pairs`, keyed by (index of the context, token): 48 bits that are the pair itself, not a hash of it. A
 * token becomes the hint when its count exceeds the hint's; of equals the earlier one stays.
 *
 * Odds. Every context that is found puts its hint into a bucket by its occurrences and the hint's share of
 * them. The odds of a hint are hits : misses of its bucket so far, plus PRIOR imaginary hints split like
 * (top_count + 1/2) : (rest + 1/2).
 *
 * Speed. The hash is a polynomial over the window, modulo 2^64, updated in constant time and mixed. Slots
 * are known up to AHEAD positions before they are read, and prefetched; a feed makes room for all its
 * tokens first, so that slots stay where they are.
 */
#ifdef __linux__
#define _DEFAULT_SOURCE /* madvise */
#include <sys/mman.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __GNUC__
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#endif
#define AHEAD 64
#define OFTEN (UINT32_C(1) << 31)
#define MAX_TOKENS (INT64_C(1) << 31)
#define FACTOR UINT64_C(0x9e3779b97f4a7c15)
#define COUNTS 37 /* 0 to 7 one by one, then by powers of two below 2^31 */
#define SHARES 21 /* steps of 1/20; the last one is for unanimous contexts */
#define PRIOR 8

enum { OK, TOO_MANY_TOKENS, OUT_OF_MEMORY };

typedef struct {
    uint32_t position, total, top_count; /* position: of the first continuation in tokens */
    uint16_t top;
} Context;

typedef struct {
    uint64_t key;
    uint32_t count; /* 0: empty */
} Pair;

typedef struct {
    int64_t hits, misses;
} Bucket;

typedef struct {
    int width, slot_bits, pair_bits;
    float threshold;
    uint16_t *tokens;
    int64_t length, token_room, origin; /* origin: where the last restart was */
    uint64_t hash, leading; /* polynomial of the last width tokens hashed; FACTOR^width */
    uint64_t *slots;
    int64_t n_slots_used;
    Context *contexts;
    uint32_t n_contexts, context_room;
    Pair *pairs;
    int64_t n_pairs;
    Bucket buckets[COUNTS][SHARES];
    /* The present context; slot is NULL while it has fewer than width tokens. total is 0 if it is new. */
    uint64_t *slot;
    uint32_t key, total, top_count;
    uint16_t hint;
    Bucket *bucket;
} State;

static void *zeros(int64_t count, size_t size) {
    char *memory = calloc((size_t)count, size);
#ifdef MADV_HUGEPAGE
    const size_t page = (size_t)1 << 21, bytes = (size_t)count * size;
    if (memory && bytes > 2 * page) {
        char *aligned = memory + (page - (uintptr_t)memory % page);
        madvise(aligned, bytes - page, MADV_HUGEPAGE);
    }
#endif
    return memory;
}

/* Makes room for so many contexts. Homes are leading bits: the old table is read, and the new one written,
 * in order. */
static int reserve_slots(State *s, int64_t contexts) {
    int bits = s->slot_bits;
    while (contexts > (INT64_C(1) << bits) / 4 * 3) bits++;
    if (s->slots && bits == s->slot_bits) return 1;
    uint64_t *slots = zeros(INT64_C(1) << bits, sizeof *slots), mask = (UINT64_C(1) << bits) - 1;
    if (!slots) return 0;
    for (int64_t i = 0; s->slots && i < INT64_C(1) << s->slot_bits; i++)
        if (s->slots[i]) {
            uint64_t to = s->slots[i] >> (64 - bits);
            while (slots[to]) to = (to + 1) & mask;
            slots[to] = s->slots[i];
        }
    free(s->slots);
    s->slots = slots;
    s->slot_bits = bits;
    return 1;
}

static Pair *find_pair(Pair *pairs, int bits, uint64_t key) {
    uint64_t i = key * FACTOR >> (64 - bits), mask = (UINT64_C(1) << bits) - 1;
    while (pairs[i].count && pairs[i].key != key) i = (i + 1) & mask;
    return &pairs[i];
}

/* Sets or, with count 0, increments the count of (context, token). Returns the count, 0 if memory ran out. */
static uint32_t count_pair(State *s, uint32_t context, uint16_t token, uint32_t count) {
    if (!s->pairs || s->n_pairs >= INT64_C(1) << s->pair_bits >> 1) {
        const int bits = s->pair_bits + 1;
        Pair *pairs = zeros(INT64_C(1) << bits, sizeof *pairs);
        if (!pairs) return 0;
        for (int64_t i = 0; s->pairs && i < INT64_C(1) << s->pair_bits; i++)
            if (s->pairs[i].count) *find_pair(pairs, bits, s->pairs[i].key) = s->pairs[i];
        free(s->pairs);
        s->pairs = pairs;
        s->pair_bits = bits;
    }
    const uint64_t key = (uint64_t)context << 16 | token;
    Pair *pair = find_pair(s->pairs, s->pair_bits, key);
    if (!pair->count) {
        pair->key = key;
        s->n_pairs++;
    }
    pair->count = count ? count : pair->count + 1;
    return pair->count;
}

/* Finds the context that the stream now ends with, or the empty slot that learn() will enter it in. */
static void look_up(State *s, uint32_t key) {
    const uint16_t *present = s->tokens + s->length - s->width;
    const uint64_t mask = (UINT64_C(1) << s->slot_bits) - 1;
    uint64_t i = key >> (32 - s->slot_bits);
    s->total = 0;
    for (; s->slots[i]; i = (i + 1) & mask) {
        if (s->slots[i] >> 32 != key) continue;
        const uint32_t value = (uint32_t)s->slots[i], often = value & OFTEN;
        const Context once = {value, 1, 1, 0}, *c = often ? &s->contexts[value ^ OFTEN] : &once;
        if (memcmp(s->tokens + c->position - s->width, present, (size_t)s->width * sizeof *present)) continue;
        s->hint = often ? c->top : s->tokens[value];
        s->total = c->total;
        s->top_count = c->top_count;
        uint32_t count = s->total;
        if (count >= 8)
            for (count = 5; s->total >> (count - 5); count++) {}
        s->bucket = &s->buckets[count][(uint64_t)s->top_count * (SHARES - 1) / s->total];
        break;
    }
    s->slot = &s->slots[i];
    s->key = key;
}

/* The present context turns out to be followed by this token. Returns 0 if memory ran out. */
static int learn(State *s, uint16_t token) {
    if (!s->total) {
        *s->slot = (uint64_t)s->key << 32 | (uint32_t)s->length;
        s->n_slots_used++;
        return 1;
    }
    if (token == s->hint) s->bucket->hits++;
    else s->bucket->misses++;
    uint32_t value = (uint32_t)*s->slot;
    if (!(value & OFTEN)) {
        if (s->n_contexts == s->context_room) {
            const uint32_t room = 2 * s->context_room + 1024;
            Context *contexts = realloc(s->contexts, room * sizeof *contexts);
            if (!contexts) return 0;
            s->contexts = contexts;
            s->context_room = room;
        }
        s->contexts[s->n_contexts] = (Context){value, 1, 1, s->hint};
        value = OFTEN | s->n_contexts++;
        *s->slot = (uint64_t)s->key << 32 | value;
    }
    const uint32_t index = value ^ OFTEN;
    Context *c = &s->contexts[index];
    c->total++;
    if (token == c->top) {
        c->top_count++;
        return 1;
    }
    const uint32_t count = count_pair(s, index, token, 0);
    if (count > c->top_count) {
        if (!count_pair(s, index, c->top, c->top_count)) return 0;
        c->top = token;
        c->top_count = count;
    }
    return count > 0;
}

/* A state for contexts of order - 1 tokens that gates hints whose share is at least threshold; NULL if
 * memory ran out. */
void *ngram_create(int order, float threshold) {
    State *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->width = order - 1;
    s->threshold = threshold;
    s->slot_bits = 10;
    s->pair_bits = 8;
    s->leading = 1;
    for (int i = 0; i < s->width; i++) s->leading *= FACTOR;
    return s;
}

void ngram_destroy(void *state) {
    State *s = state;
    free(s->tokens);
    free(s->slots);
    free(s->contexts);
    free(s->pairs);
    free(s);
}

/* Makes room for n tokens and so many contexts more. */
static int make_room(State *s, int64_t n, int64_t contexts) {
    if (n > MAX_TOKENS - s->length) return TOO_MANY_TOKENS;
    const int64_t needed = s->length + n;
    if (needed > s->token_room) {
        const int64_t room = needed > 2 * s->token_room ? needed : 2 * s->token_room;
        uint16_t *tokens = realloc(s->tokens, (size_t)room * sizeof *tokens);
        if (!tokens) return OUT_OF_MEMORY;
        s->tokens = tokens;
        s->token_room = room;
    }
    return reserve_slots(s, s->n_slots_used + contexts) ? OK : OUT_OF_MEMORY;
}

/* Feeds n tokens, for which there is room, and writes the entries first to last - 1. */
static int feed(State *s, const uint16_t *fed, int64_t n, int64_t first, int64_t last, uint16_t *hints,
                uint8_t *gates, float *odds) {
    const int64_t before = s->length - s->origin, lag = n < AHEAD ? n : AHEAD;
    const uint16_t *tokens = memcpy(s->tokens + s->length, fed, (size_t)n * sizeof *fed);
    uint32_t keys[AHEAD];
    for (int64_t ahead = 0; ahead < n + lag; ahead++) {
        const int64_t i = ahead - lag;
        if (i >= 0) {
            if (s->slot && !learn(s, tokens[i])) return OUT_OF_MEMORY;
            if (++s->length - s->origin >= s->width) look_up(s, keys[i % AHEAD]);
        }
        if (i >= first && i < last) {
            const int gated = s->total && (float)((double)s->top_count / s->total) >= s->threshold;
            gates[i - first] = (uint8_t)gated;
            hints[i - first] = gated ? s->hint : 0;
            if (odds) {
                const double prior = gated ? PRIOR * (s->top_count + .5) / (s->total + 1.) : 0;
                const Bucket *b = s->bucket;
                odds[i - first] = gated ? (float)((b->hits + prior) / (b->misses + PRIOR - prior)) : 0;
            }
        }
        if (ahead < n) {
            s->hash = s->hash * FACTOR + tokens[ahead] + 1;
            if (before + ahead >= s->width) s->hash -= s->leading * (tokens[ahead - s->width] + UINT64_C(1));
            const uint64_t mixed = (s->hash ^ s->hash >> 32) * FACTOR;
            const uint32_t key = keys[ahead % AHEAD] = (uint32_t)((mixed ^ mixed >> 29) * FACTOR >> 32);
            if (before + ahead + 1 >= s->width) PREFETCH(&s->slots[key >> (32 - s->slot_bits)]);
        }
    }
    return OK;
}

/* Feeds n tokens; hints, gates and odds get n entries each, odds may be NULL. Ungated entries are 0. After
 * OUT_OF_MEMORY the state may only be destroyed. */
int ngram_feed(void *state, const uint16_t *fed, int64_t n, uint16_t *hints, uint8_t *gates, float *odds) {
    State *s = state;
    if (n < 1) return OK;
    const int problem = make_room(s, n, n);
    if (problem) return problem;
    if (s->slot) look_up(s, s->key); /* slots may have moved */
    return feed(s, fed, n, 0, n, hints, gates, odds);
}

/* Forgets the present context, not the counts: what is fed next does not continue what was fed before. */
void ngram_restart(void *state) {
    State *s = state;
    s->origin = s->length;
    s->hash = 0;
    s->slot = NULL;
    s->total = 0;
}

/* Tokens of context that target t has in a document whose first token is stream[first]. */
static int64_t context_length(const State *s, int64_t first, int64_t t) {
    return t - first < s->width ? t - first + 1 : s->width;
}

/* Feeds rows of targets, target t being stream[t + 1]: restarts for each row r, feeds the context of target
 * begin[r] within the document whose first token is stream[first[r]], then targets begin[r] to end[r] - 1,
 * each of which gets an entry. Reads nothing past stream[end[r]], the last of them. 0 <= first[r] <=
 * begin[r] <= end[r]. Otherwise as ngram_feed. */
int ngram_feed_rows(void *state, const uint16_t *stream, int64_t n_rows, const int64_t *first,
                    const int64_t *begin, const int64_t *end, uint16_t *hints, uint8_t *gates, float *odds) {
    State *s = state;
    int64_t targets = 0, contexts = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        targets += end[r] - begin[r];
        contexts += context_length(s, first[r], begin[r]);
        if (targets + contexts > MAX_TOKENS) return TOO_MANY_TOKENS;
    }
    int problem = make_room(s, targets + contexts, targets);
    for (int64_t r = 0; r < n_rows && !problem; r++) {
        const int64_t n = end[r] - begin[r], context = context_length(s, first[r], begin[r]);
        const int64_t entry = context - 1; /* the last token of the context has the first target's entry */
        ngram_restart(s);
        problem = feed(s, stream + begin[r] - entry, context + n, entry, entry + n, hints, gates, odds);
        hints += n;
        gates += n;
        if (odds) odds += n;
    }
    return problem;
}
