/* What follows the present context, by two kinds of count over a stream of token ids, for the n-gram tilt.
 *
 *   ngram_...    exact: the token that has followed the last `width` tokens most often, and in what share of
 *                their occurrences; the token expert of the published tilt, over a stream in its order
 *   experts_...  several contexts at once, of the whole text or of the document alone, in fixed memory; each
 *                hints one token and says how often such hints came true; in the order of scoring
 *
 * A hint for the token after position i is computed from the tokens up to and including i (C1), and counts
 * change only when that token is learned (C3): the state cannot know more than a decoder does.
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
enum { OK, TOO_MANY_TOKENS, OUT_OF_MEMORY };

/* --- Exact counts
 *
 * Contexts. `slots` is an open-addressing table with linear probing, 8 bytes a slot, at most 3/4 full. The
 * upper half of a slot is the 32-bit hash of the context, whose leading bits are its home; the lower half
 * says where the context stands: once seen, the position of its continuation in `tokens`; seen again, OFTEN
 * plus its index in `contexts`. Equal hashes only nominate a slot: it counts as found when all `width`
 * tokens before that position equal the present ones. So hints and gates are exact for every stream; a poor
 * hash would cost time, never a wrong count.
 *
 * Continuations. The count of the most frequent one is kept in its context, the counts of the others in
 * `pairs`, keyed by (index of the context, token): 48 bits that are the pair itself, not a hash of it. A
 * token becomes the hint when its count exceeds the hint's; of equals the earlier one stays.
 *
 * Speed. The hash is a polynomial over the window, modulo 2^64, updated in constant time and mixed. Slots
 * are known up to AHEAD positions before they are read, and prefetched; a feed makes room for all its
 * tokens first, so that slots stay where they are.
 */
typedef struct {
    uint32_t position, total, top_count; /* position: of the first continuation in tokens */
    uint16_t top;
} Context;

typedef struct {
    uint64_t key;
    uint32_t count; /* 0: empty */
} Pair;

typedef struct {
    int width, slot_bits, pair_bits;
    float threshold;
    uint16_t *tokens;
    int64_t length, token_room;
    uint64_t hash, leading; /* polynomial of the last width tokens hashed; FACTOR^width */
    uint64_t *slots;
    int64_t n_slots_used;
    Context *contexts;
    uint32_t n_contexts, context_room;
    Pair *pairs;
    int64_t n_pairs;
    /* The present context; slot is NULL while it has fewer than width tokens. total is 0 if it is new. */
    uint64_t *slot;
    uint32_t key, total, top_count;
    uint16_t hint;
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

static uint64_t mixed(uint64_t hash) {
    hash = (hash ^ hash >> 32) * FACTOR;
    return (hash ^ hash >> 29) * FACTOR;
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

/* Makes room for n tokens, each of which may end a new context. */
static int make_room(State *s, int64_t n) {
    if (n > MAX_TOKENS - s->length) return TOO_MANY_TOKENS;
    const int64_t needed = s->length + n;
    if (needed > s->token_room) {
        const int64_t room = needed > 2 * s->token_room ? needed : 2 * s->token_room;
        uint16_t *tokens = realloc(s->tokens, (size_t)room * sizeof *tokens);
        if (!tokens) return OUT_OF_MEMORY;
        s->tokens = tokens;
        s->token_room = room;
    }
    return reserve_slots(s, s->n_slots_used + n) ? OK : OUT_OF_MEMORY;
}

/* Feeds n tokens; hints and gates get n entries each. Ungated entries are 0. After OUT_OF_MEMORY the state
 * may only be destroyed. */
int ngram_feed(void *state, const uint16_t *fed, int64_t n, uint16_t *hints, uint8_t *gates) {
    State *s = state;
    if (n < 1) return OK;
    const int problem = make_room(s, n);
    if (problem) return problem;
    if (s->slot) look_up(s, s->key); /* slots may have moved */
    const int64_t before = s->length, lag = n < AHEAD ? n : AHEAD;
    const uint16_t *tokens = memcpy(s->tokens + s->length, fed, (size_t)n * sizeof *fed);
    uint32_t keys[AHEAD];
    for (int64_t ahead = 0; ahead < n + lag; ahead++) {
        const int64_t i = ahead - lag;
        if (i >= 0) {
            if (s->slot && !learn(s, tokens[i])) return OUT_OF_MEMORY;
            if (++s->length >= s->width) look_up(s, keys[i % AHEAD]);
            const int gated = s->total && (float)((double)s->top_count / s->total) >= s->threshold;
            gates[i] = (uint8_t)gated;
            hints[i] = gated ? s->hint : 0;
        }
        if (ahead < n) {
            s->hash = s->hash * FACTOR + tokens[ahead] + 1;
            if (before + ahead >= s->width) s->hash -= s->leading * (tokens[ahead - s->width] + UINT64_C(1));
            const uint32_t key = keys[ahead % AHEAD] = (uint32_t)(mixed(s->hash) >> 32);
            if (before + ahead + 1 >= s->width) PREFETCH(&s->slots[key >> (32 - s->slot_bits)]);
        }
    }
    return OK;
}

/* --- Experts
 *
 * An expert keeps for each context, the last `width` tokens within their document, one token that has
 * followed it: its hint. The hint's confidence grows by one when it comes true and is halved when it does
 * not; at 0 the token that came instead takes its place. So it is the most frequent continuation where there
 * is one, the latest where there is none. With `in_document` the document is part of the context.
 *
 * Entries stand in buckets of WAYS, 32 bytes each, of two tables: a small one for contexts in documents,
 * which are of no use once the document has ended. The leading bits of a context's 64-bit hash name its
 * bucket, the last 32 mark its entry; where a bucket is full, the entry with the fewest occurrences makes
 * way. Two contexts taken for one, or one forgotten, make a worse hint, never an invalid one: a table is a
 * function of what was learned, the same for a decoder.
 *
 * Odds. Hints of an expert share a rate if they have about the same confidence, occurrences and run: how many
 * of its hints for the document's last targets came true in a row. A long run means a passage that is copied.
 * The odds are hits : misses so far, plus PRIOR imaginary hints split like (confidence + 1/2) :
 * (occurrences - confidence + 1/2).
 */
#define WAYS 4
#define RUNS 9
#define LEVELS 5
#define PRIOR 8
#define EXPERTS 16       /* at most */
#define DOCUMENT_BITS 22 /* at most */
#define WINDOW 32  /* targets whose buckets are prefetched */

typedef struct {
    uint32_t mark; /* 0: empty */
    uint16_t hint;
    uint8_t confidence, occurrences; /* up to 255 */
} Entry;

typedef struct {
    int64_t hits, misses;
} Rate;

typedef struct {
    int width, in_document, bits;
    Entry *entries; /* 2^bits, of one of the tables */
    uint64_t leading; /* FACTOR^width */
    Rate rates[RUNS][LEVELS][LEVELS];
} Expert;

typedef struct {
    int count, widest;
    uint8_t level[256], run_level[256];
    uint8_t *runs; /* (documents, count), up to 255 */
    Entry *tables[2]; /* of the text, of documents */
    Expert experts[EXPERTS];
} Experts;

typedef struct {
    Entry *bucket;
    uint32_t mark; /* 0: the document has no such context yet */
} Place;

typedef struct {
    Entry *entry; /* that of the context if it was found, else the one that makes way; NULL without context */
    Rate *rate;   /* NULL if it was not found */
} Answer;

static void fill_levels(uint8_t *levels, int count, const int *first) {
    for (int i = 0, level = 0; i < 256; i++) {
        if (level + 1 < count && i == first[level + 1]) level++;
        levels[i] = (uint8_t)level;
    }
}

void experts_destroy(void *state) {
    Experts *s = state;
    free(s->tables[0]);
    free(s->tables[1]);
    free(s->runs);
    free(s);
}

/* Experts of these widths; those of the whole text share 2^bits entries, bits >= 2. NULL if memory ran
 * out. */
void *experts_create(int count, const int32_t *widths, const int32_t *in_document, int bits,
                     int64_t documents) {
    Experts *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    const int table_bits[2] = {bits, bits < DOCUMENT_BITS ? bits : DOCUMENT_BITS};
    for (int i = 0; i < 2; i++) s->tables[i] = zeros(INT64_C(1) << table_bits[i], sizeof **s->tables);
    s->runs = zeros(documents + 1, (size_t)count);
    if (!s->tables[0] || !s->tables[1] || !s->runs) {
        experts_destroy(s);
        return NULL;
    }
    s->count = count;
    for (int e = 0; e < count; e++) {
        Expert *x = &s->experts[e];
        x->width = widths[e];
        x->in_document = in_document[e];
        x->bits = table_bits[x->in_document];
        x->entries = s->tables[x->in_document];
        x->leading = 1;
        for (int i = 0; i < x->width; i++) x->leading *= FACTOR;
        if (x->width > s->widest) s->widest = x->width;
    }
    fill_levels(s->level, LEVELS, (const int[LEVELS]){0, 1, 2, 3, 8});
    fill_levels(s->run_level, RUNS, (const int[RUNS]){0, 1, 2, 4, 8, 16, 32, 64, 255});
    return s;
}

/* The expert's hint in this place and the odds that it comes true, 0 if it has none. run: of the expert in
 * the document. */
static Answer ask(const Experts *s, Expert *x, Place place, const uint8_t *run, uint16_t *hint, float *odds) {
    *hint = 0;
    *odds = 0;
    if (!place.mark) return (Answer){NULL, NULL};
    Entry *found = NULL, *rarest = place.bucket;
    for (int way = 0; way < WAYS; way++) { /* without a branch: which way it is cannot be foreseen */
        Entry *one = &place.bucket[way];
        found = one->mark == place.mark ? one : found;
        rarest = one->occurrences < rarest->occurrences ? one : rarest;
    }
    if (!found) return (Answer){rarest, NULL};
    Rate *rate = &x->rates[s->run_level[*run]][s->level[found->confidence]][s->level[found->occurrences]];
    const int others = found->occurrences - found->confidence;
    const float part = PRIOR / (found->occurrences + 1.f);
    const float hits = (float)rate->hits + part * (found->confidence + .5f);
    *hint = found->hint;
    *odds = hits / ((float)rate->misses + part * (others + .5f));
    return (Answer){found, rate};
}

/* Learns the token after this place, for which the expert gave this hint and answer. */
static void learn_token(Place place, Answer answer, uint8_t *run, uint16_t hint, uint16_t token) {
    Entry *entry = answer.entry;
    if (!entry) return;
    if (!answer.rate) {
        *entry = (Entry){place.mark, token, 1, 1};
        *run = 0;
        return;
    }
    const int hit = token == hint, confidence = entry->confidence;
    const int changed = hit ? confidence + (confidence < 255) : confidence / 2;
    answer.rate->hits += hit;
    answer.rate->misses += !hit;
    *run = (uint8_t)(hit ? *run + (*run < 255) : 0);
    if (entry->mark != place.mark) return; /* it has made way for another expert's context */
    entry->occurrences += entry->occurrences < 255;
    entry->hint = changed ? hint : token;
    entry->confidence = (uint8_t)(changed ? changed : 1);
}

/* Hints and odds for targets begin to end - 1 of a document, an entry for each expert. Target t is
 * stream[t + 1], read only to learn it; the document's first token is stream[first]. */
static void ask_row(Experts *s, const uint16_t *stream, uint64_t document, int64_t first, int64_t begin,
                    int64_t end, int learns, uint16_t *hints, float *odds) {
    const int64_t start = begin - first < s->widest ? first : begin - s->widest + 1;
    uint8_t *runs = s->runs + document * (uint64_t)s->count;
    uint64_t hash[EXPERTS] = {0}, seed[EXPERTS]; /* hash: polynomial of the last width tokens */
    Place places[WINDOW][EXPERTS];
    Answer answers[EXPERTS];
    for (int e = 0; e < s->count; e++)
        seed[e] = s->experts[e].in_document ? mixed(document + 1) : 0;
    for (int64_t ahead = start; ahead < end + WINDOW; ahead++) {
        const int64_t t = ahead - WINDOW;
        if (t >= begin) {
            const Place *place = places[t % WINDOW];
            for (int e = 0; e < s->count; e++)
                answers[e] = ask(s, &s->experts[e], place[e], &runs[e], &hints[e], &odds[e]);
            for (int e = 0; e < s->count && learns; e++)
                learn_token(place[e], answers[e], &runs[e], hints[e], stream[t + 1]);
            hints += s->count;
            odds += s->count;
        }
        for (int e = 0; e < s->count && ahead < end; e++) {
            const Expert *x = &s->experts[e];
            hash[e] = hash[e] * FACTOR + stream[ahead] + 1;
            if (ahead - start >= x->width) hash[e] -= x->leading * (stream[ahead - x->width] + UINT64_C(1));
            if (ahead < begin) continue;
            const uint64_t key = mixed(hash[e] + seed[e]);
            Place *place = &places[ahead % WINDOW][e];
            place->bucket = x->entries + (key >> (64 - x->bits) & ~(uint64_t)(WAYS - 1));
            place->mark = ahead - start + 1 < x->width ? 0 : (uint32_t)key | 1;
            PREFETCH(place->bucket);
        }
    }
}

/* Hints and odds (targets, experts) for rows of targets, one row after another; each target is learned before
 * the next one is asked for, unless `learns` is 0. first, begin, end: as in ask_row, of each row, in
 * `stream`; document: a number of its own. Odds are 0 where an expert has no hint. */
void experts_ask(void *state, const uint16_t *stream, int64_t n_rows, const int64_t *document,
                 const int64_t *first, const int64_t *begin, const int64_t *end, int learns, uint16_t *hints,
                 float *odds) {
    Experts *s = state;
    for (int64_t r = 0; r < n_rows; r++) {
        ask_row(s, stream, (uint64_t)document[r], first[r], begin[r], end[r], learns, hints, odds);
        hints += s->count * (end[r] - begin[r]);
        odds += s->count * (end[r] - begin[r]);
    }
}
