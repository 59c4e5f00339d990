#include "step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace kvist {
namespace {

struct Share {
    int64_t begin, end;
};

// Thread t's part of n equal pieces of work.
Share share(int64_t n, int t, int threads) { return {n * t / threads, n * (t + 1) / threads}; }

// Rows of one sequence that attend together: they share each reading of the cache.
struct Block {
    int row, count, sequence, position;  // position: of the first
    int token;                           // of the pass; its row, unless rows are divided among threads
};

constexpr int PHASES = 10;  // of a layer in which work is dealt out, at most
constexpr int GROUPS = 2;  // of 16 rows of a matrix that a thread takes at a time
constexpr int MOST_SAMPLED = 64;  // rows of logits whose largest is looked for

// Most rows of a pass, and how many it has with those that fill up each thread's.
int most_rows(int threads) { return std::min(THREAD_ROWS * threads, PASS_ROWS); }
int placed(int rows, int threads) { return rows + 2 * ROW_TILE * threads; }

// The largest of what a thread has made of a row of logits.
struct Best {
    int64_t at = 0;
    float value = -HUGE_VALF;
    bool finite = true;

    void meet(const Kernels& k, const float* row, int64_t begin, int64_t size) {
        finite &= k.all_finite(row + begin, size);
        meet(begin + k.argmax(row + begin, size), row);
    }
    void meet(int64_t other, const float* row) {
        if (row[other] > value || (row[other] == value && other < at)) at = other, value = row[other];
    }
};

// One pass over the weights for the rows [first, first + rows) of a step.
class Pass {
  public:
    Pass(Model& model, Workspace& space, const StepInput& input, int first, int rows, int threads)
        : m(model), w(space), in(input), s(model.shape), k(*model.kernels), first_(first),
          rows_(rows), threads_(threads), apart_(rows >= APART_ROWS * threads),
          group_(s.heads / s.kv_heads),
          q_size(s.heads * s.head_dim), kv_size(s.kv_heads * s.head_dim), ld(q_size + 2 * kv_size),
          tokens_(placed(rows, threads)), places_(rows), owned_(threads, {{0, rows}, {}}),
          logits_(input.logits ? input.logits : model.screen->logits()),
          screened_(!input.logits && model.screen->ready()),
          dealt_((size_t)(PHASES * model.shape.layers + PHASES)), turns_(threads_) {
        cut_blocks();
        place_rows();
        const int64_t* rows_end = in.logit_rows + in.logit_count;
        logits_begin_ = std::lower_bound(in.logit_rows, rows_end, first) - in.logit_rows;
        logits_end_ = std::lower_bound(in.logit_rows, rows_end, first + rows) - in.logit_rows;
        const int64_t found = logits_end_ - logits_begin_;
        if (in.largest && found <= MOST_SAMPLED) best_.resize(found * threads_);
        // Few blocks: their spans are dealt out, and merged by all; the numbers are the same.
        split_ = !apart_ && (rows <= FEW_ROWS || (int64_t)blocks_.size() * s.kv_heads < 8 * threads_);
        int64_t spans = 0;
        for (const Block& block : blocks_) {
            begins_.push_back(spans);
            spans += (int64_t)block.count * most_spans(block);
        }
        space.reserve(model, (int)tokens_.size(), split_ ? spans : threads_ * most_of_a_thread());
    }

    // Once all threads are done: the first largest of each row of logits.
    void find_largest() {
        const int64_t rows = logits_end_ - logits_begin_, width = (int64_t)m.head.groups * LANES;
        for (int64_t i = 0; i < rows && in.largest; i++) {
            Best all;
            for (int t = 0; t < threads_ && !best_.empty(); t++) {
                const Best& own = best_[t * rows + i];
                all.finite &= own.finite;
                if (own.value > -HUGE_VALF) all.meet(own.at, logits_ + (logits_begin_ + i) * width);
            }
            in.largest[logits_begin_ + i] = !best_.empty() && all.finite ? all.at : -1;
        }
    }

    int64_t groups_read() const {
        int64_t all = 0;
        for (const Turn& turn : turns_) all += turn.groups_read;
        return all;
    }

    void work(int t) {
        turns_[t].value = 0;
        begin(t);
        meet(t);
        for (int l = 0; l < s.layers; l++) layer(l, t);
        if (apart_) m.pool.barrier(t);
        head(t);
    }

  private:
    Share mine(int64_t n, int t) const { return share(n, t, threads_); }

    void cut_blocks() {
        const int together = std::max(1, k.together / group_), least = apart_ ? threads_ : 1;
        for (int b = 0; b < in.sequences; b++) {
            const int begin = std::max(in.query_starts[b], first_);
            const int rows = std::min(in.query_starts[b + 1], first_ + rows_) - begin;
            if (rows <= 0) continue;
            // As many for each thread, where there are enough.
            const int needed = (rows + together - 1) / together;
            const int blocks = std::min((needed + least - 1) / least * least, rows);
            for (int i = 0; i < blocks; i++) {
                const Share part = share(rows, i, blocks);
                const int token = begin - first_ + (int)part.begin;
                blocks_.push_back({token, (int)(part.end - part.begin), b,
                                   in.kv_lens[b] - (in.query_starts[b + 1] - begin) + (int)part.begin,
                                   token});
            }
        }
    }

    // Rows need each other's keys and values, nothing else. When they are many, each thread takes its
    // own through all of a layer, so that they stay in its cache and threads wait but once: each block,
    // the costliest first, goes to the thread that has least to do. A thread's rows lie side by side.
    void place_rows() {
        if (apart_) {
            // A row's products take about as long as its attention to so many positions.
            constexpr int PRODUCTS = 512;
            auto cost = [](const Block& block) {
                return (int64_t)block.count * (PRODUCTS + block.position);
            };
            std::stable_sort(blocks_.begin(), blocks_.end(), [&](const Block& a, const Block& b) {
                return cost(a) > cost(b);
            });
            std::vector<std::vector<Block>> dealt(threads_);
            std::vector<int64_t> costs(threads_);
            for (const Block& block : blocks_) {
                const size_t t = std::min_element(costs.begin(), costs.end()) - costs.begin();
                dealt[t].push_back(block), costs[t] += cost(block);
            }
            blocks_.clear();
            constexpr int RUN = 2 * ROW_TILE;  // which matrix units take together
            for (int t = 0, row = 0; t < threads_; t++) {
                const int first = row = (row + RUN - 1) / RUN * RUN;
                const int64_t before = (int64_t)blocks_.size();
                for (Block& block : dealt[t]) {
                    block.row = row, row += block.count;
                    blocks_.push_back(block);
                }
                owned_[t] = {{first, row}, {before, (int64_t)blocks_.size()}};
            }
        }
        for (const Block& block : blocks_)
            for (int i = 0; i < block.count; i++) {
                tokens_[block.row + i] = block.token + i;
                places_[block.token + i] = block.row + i;
            }
    }

    // The rows that a thread works on: its own, or all with its part of the weights.
    Share rows_of(int t) const { return owned_[t].rows; }
    // Where threads wait for each other only if they divide the weights.
    void meet(int t) {
        if (!apart_) m.pool.barrier(t);
    }

    // Work of a phase, as runs of pieces. Few rows read weights once: each thread reads its own in
    // one stream. More rows compute: threads take small runs in turn, so that one which has lost its
    // core to another program holds up little. All threads deal in the same order.
    template <typename Work> void deal(int t, int64_t pieces, int64_t run, Work work) {
        std::atomic<int64_t>& next = dealt_[turns_[t].value++];
        if (rows_ <= FEW_ROWS) {
            const Share own = mine(pieces, t);
            if (own.begin < own.end) work(own);
            return;
        }
        for (;;) {
            const int64_t begin = next.fetch_add(run, std::memory_order_relaxed);
            if (begin >= pieces) return;
            work(Share{begin, std::min(begin + run, pieces)});
        }
    }

    // The same of what threads share only if they divide the weights; else a thread does its own.
    template <typename Work>
    void deal(int t, Share own, int64_t pieces, int64_t run, Work work) {
        if (apart_) work(own);
        else deal(t, pieces, run, work);
    }
    // The same of a matrix times the thread's rows.
    template <typename Work> void deal_groups(int t, int64_t groups, int64_t run, Work work) {
        deal(t, {0, groups}, groups, run, work);
    }

    float* x(int64_t row) const { return w.x + row * s.hidden; }
    float* q(int64_t row) const { return w.projected + row * ld; }
    float* key(int64_t row) const { return q(row) + q_size; }
    float* value(int64_t row) const { return key(row) + kv_size; }
    const float* rotation(int64_t row) const { return w.rotation + row * s.head_dim; }

    // Embeddings, and the cosines and sines of all rows.
    void begin(int t) {
        const Share rows = apart_ ? rows_of(t) : mine(rows_, t);
        const int64_t bytes = stored_row_bytes(m.embedding_type, s.hidden);
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const int64_t i = first_ + tokens_[r];
            if (in.embeddings) memcpy(x(r), in.embeddings + i * s.hidden, s.hidden * 4);
            else read_row(m.embedding_type, m.embedding + in.token_ids[i] * bytes, s.hidden, x(r));
            float* to = w.rotation + r * s.head_dim;
            for (int c = 0; c < s.head_dim / 2; c++) {
                const float angle = (float)in.rotations[i] * m.frequencies[c];
                to[c] = std::cos(angle) * s.rotation_scale;
                to[s.head_dim / 2 + c] = std::sin(angle) * s.rotation_scale;
            }
        }
    }

    // Rows as a matrix takes them: each thread makes all when they are few, else its own part.
    template <typename Make>
    Activations prepare(int t, int columns, int64_t rows, Make make) {
        const bool few = rows <= FEW_ROWS;
        Activations to = few ? w.own[t] : w.shared;
        to.columns = columns;
        to.lone = rows == 1;
        auto make_all = [&](Share part) {
            for (int64_t r = part.begin; r < part.end; r++) make(to, (int)r);
        };
        if (few) {
            make_all({0, rows});
        } else {
            deal(t, rows, ROW_TILE, make_all);
            m.pool.barrier(t);
        }
        return to;
    }

    // The same of the rows that the thread works on; the first of them comes first.
    template <typename Make> Activations prepare(int t, int columns, Make make) {
        if (!apart_)
            return prepare(t, columns, rows_, [&](const Activations& to, int r) { make(to, r, r); });
        const Share own = rows_of(t);
        Activations to = w.shared.from(own.begin);  // where rows of any width have room
        to.columns = columns;
        for (int64_t r = own.begin; r < own.end; r++) make(to, (int)(r - own.begin), (int)r);
        return to;
    }

    Activations normed(int t, const std::vector<float>& weight) {
        return prepare(t, s.hidden, [&](const Activations& to, int at, int row) {
            k.norm_quantise(x(row), weight.data(), s.norm_eps, to, at);
        });
    }

    // Where a thread begins to read a matrix whose pieces few rows divide among threads.
    const uint8_t* begin_of(const Matrix& matrix, int64_t pieces, int t) const {
        return matrix.data + mine(pieces, t).begin * (matrix.groups / pieces) * matrix.stride;
    }
    // The same of a layer's projections; behind the last layer comes the head.
    const uint8_t* begin_of_layer(int l, int t) const {
        if (l == s.layers) return begin_of(screened_ ? m.screen->coarse() : m.head, m.head.groups, t);
        const Matrix* parts = m.layers[l].matrices;
        int64_t group = mine(parts[Q_PROJ].groups + parts[K_PROJ].groups + parts[V_PROJ].groups, t).begin;
        int slot = Q_PROJ;
        while (group >= parts[slot].groups) group -= parts[slot++].groups;
        return parts[slot].data + group * parts[slot].stride;
    }
    // A matrix whose reader goes on there.
    Matrix before(Matrix matrix, const uint8_t* next) const {
        if (rows_ <= FEW_ROWS) matrix.next = next;
        return matrix;
    }

    void linear(const Matrix& matrix, Share part, const Activations& from, Share rows, float* out,
                int64_t out_ld, bool add, int t) {
        if (part.begin < part.end && rows.begin < rows.end)
            k.linear(matrix, (int)part.begin, (int)part.end, from, (int)(rows.end - rows.begin),
                     out + rows.begin * out_ld, out_ld, add, w.scratch[t]);
    }

    void layer(int l, int t) {
        const Layer& layer = m.layers[l];
        project(layer, t);
        meet(t);
        turn_and_write(l, t);
        m.pool.barrier(t);
        attention(l, t);
        meet(t);
        const Activations attended = prepare(t, q_size, [&](const Activations& to, int at, int row) {
            const float* from =
                split_ ? merged(in.layers[l], row, t) : w.attended + (int64_t)row * q_size;
            k.quantise(from, to, at);
        });
        const Matrix output = before(layer.matrices[O_PROJ], begin_of(layer.matrices[GATE], s.intermediate / BLOCK, t));
        deal_groups(t, output.groups, GROUPS, [&](Share part) {
            linear(output, part, attended, rows_of(t), w.x, s.hidden, true, t);
        });
        meet(t);
        mlp(l, t);
        meet(t);
    }

    void project(const Layer& layer, int t) {
        const Activations from = normed(t, layer.input_norm);
        const Matrix* parts = layer.matrices;
        const int64_t groups = parts[Q_PROJ].groups + parts[K_PROJ].groups + parts[V_PROJ].groups;
        const uint8_t* output = begin_of(parts[O_PROJ], parts[O_PROJ].groups, t);
        deal_groups(t, groups, GROUPS, [&](Share all) {
            int64_t first = 0;
            for (int slot = Q_PROJ; slot <= V_PROJ; slot++) {
                const int64_t own = parts[slot].groups;
                const Share part{std::clamp<int64_t>(all.begin - first, 0, own),
                                 std::clamp<int64_t>(all.end - first, 0, own)};
                const bool last = first + own >= all.end;
                linear(last ? before(parts[slot], output) : parts[slot], part, from, rows_of(t),
                       w.projected + first * LANES, ld, false, t);
                first += own;
            }
        });
    }

    void mlp(int l, int t) {
        const Layer& layer = m.layers[l];
        const Activations from = normed(t, layer.post_norm);
        const Matrix down = before(layer.matrices[DOWN], begin_of_layer(l + 1, t));
        const Matrix gate = before(layer.matrices[GATE], begin_of(down, down.groups, t));
        const Share rows = rows_of(t);
        Activations hidden = w.intermediate.from(rows.begin);
        hidden.lone = rows_ == 1;
        deal_groups(t, s.intermediate / BLOCK, 1, [&](Share blocks) {
            if (rows.begin < rows.end)
                k.gate_up(gate, layer.matrices[UP], (int)blocks.begin, (int)blocks.end, from,
                          (int)(rows.end - rows.begin), hidden, w.scratch[t]);
        });
        meet(t);
        deal_groups(t, down.groups, GROUPS, [&](Share part) {
            linear(down, part, hidden, rows, w.x, s.hidden, true, t);
        });
    }

    // Attention.

    HeadPlane plane(const LayerInput& layer, const PlaneInput& side, int sequence, int head) const {
        const int64_t bytes = side.element == F32 ? 4 : side.element == BF16 ? 2 : 1;
        const int64_t scale = head * side.scale_head_stride;
        return {(uint8_t*)side.x + head * side.head_stride * bytes,
                side.scale + scale,
                side.zero + scale,
                side.centre ? side.centre + (int64_t)head * s.head_dim : nullptr,
                layer.table + sequence * layer.table_width,
                side.block_stride,
                side.token_stride,
                side.scale_block_stride,
                side.scale_token_stride,
                layer.block_size,
                layer.ring,
                layer.sinks,
                side.group,
                (Element)side.element};
    }

    void turn(float* vector, const std::vector<float>& norm, int row, float scale) {
        if (s.qk_norm) k.norm(vector, norm.data(), s.norm_eps, s.head_dim);
        k.rotate(vector, rotation(row), s.head_dim, scale);
    }

    // Queries are rotated in place; keys too, and written with the values.
    void turn_and_write(int l, int t) {
        const LayerInput& layer = in.layers[l];
        const float scale = 1.f / std::sqrt((float)s.head_dim);
        const bool rotated = layer.key.element >= I8;
        const Share rows = rows_of(t), own{rows.begin * s.kv_heads, rows.end * s.kv_heads};
        deal(t, own, (int64_t)rows_ * s.kv_heads, 48, [&](Share items) {
            size_t b = 0;
            for (int64_t i = items.begin; i < items.end; i++) {
                const int row = (int)(i / s.kv_heads), head = (int)(i % s.kv_heads);
                while (row >= blocks_[b].row + blocks_[b].count) b++;
                const int position = blocks_[b].position + row - blocks_[b].row;
                for (int g = 0; g < group_; g++) {
                    float* query = q(row) + (head * group_ + g) * s.head_dim;
                    turn(query, m.layers[l].q_norm, row, scale);
                    if (rotated) k.unrotate(query, s.head_dim);
                }
                float* own = key(row) + head * s.head_dim;
                turn(own, m.layers[l].k_norm, row, 1.f);
                const int sequence = blocks_[b].sequence;
                k.store(plane(layer, layer.key, sequence, head), position, own, s.head_dim);
                k.store(plane(layer, layer.value, sequence, head), position,
                        value(row) + head * s.head_dim, s.head_dim);
            }
        });
    }

    // Spans of a block: those that hold sinks, then those from the first that a query sees.
    struct Spans {
        int sinks, first, count;
        int at(int i) const { return i < sinks ? i : first + i - sinks; }
    };

    int first_seen(const LayerInput& layer, int position) const {
        return layer.window ? std::max(0, position + 1 - layer.window) : 0;
    }

    Spans spans_of(const LayerInput& layer, const Block& block) const {
        const int last = (block.position + block.count + SPAN - 1) / SPAN;
        const int first = first_seen(layer, block.position) / SPAN;
        const int sinks = layer.window ? std::min((layer.sinks + SPAN - 1) / SPAN, first) : 0;
        return {sinks, first, sinks + last - first};
    }

    int most_spans(const Block& block) const {
        return (block.position + block.count + SPAN - 1) / SPAN;
    }
    // What a thread needs for a block that it takes alone, one head at a time.
    int64_t most_of_a_thread() const {
        int64_t most = 0;
        for (const Block& block : blocks_)
            most = std::max(most, (int64_t)block.count * most_spans(block));
        return most;
    }

    int64_t record() const { return part_record(s.head_dim); }

    // What came of a head's queries over the block's span i; see Attention. `base` is the block's own.
    float* part(const Block& block, int64_t base, int head, int i) const {
        const int64_t queries = (int64_t)block.count * group_;
        return w.parts + (base * s.heads + (head * most_spans(block) + i) * queries) * record();
    }

    void attend(const LayerInput& layer, const Block& block, int head, int span, float* to) {
        alignas(64) float queries[64 * MOST_HEAD_DIM];
        int32_t first[64], last[64];
        const int width = group_ * s.head_dim;
        for (int i = 0; i < block.count; i++) {
            memcpy(queries + i * width, q(block.row + i) + head * width, width * 4);
            for (int g = 0; g < group_; g++) {
                first[i * group_ + g] = first_seen(layer, block.position + i);
                last[i * group_ + g] = block.position + i + 1;
            }
        }
        k.attend({plane(layer, layer.key, block.sequence, head),
                  plane(layer, layer.value, block.sequence, head), queries, block.count * group_,
                  s.head_dim, span * SPAN, span * SPAN + SPAN, layer.window ? layer.sinks : 0, first,
                  last, to, block.count == 1});
    }

    // All queries of one head of a block's row i -> out [group, head_dim].
    void merge(const LayerInput& layer, const Block& block, int64_t base, int head, int i,
               float* out) {
        const int64_t stride = (int64_t)block.count * group_ * record();
        for (int g = 0; g < group_; g++) {
            float* to = out + g * s.head_dim;
            k.merge(part(block, base, head, 0) + (i * group_ + g) * record(), stride,
                    spans_of(layer, block).count, s.head_dim, to);
            if (layer.value.element >= I8) k.unrotate(to, s.head_dim);
        }
    }

    void attention(int l, int t) {
        const LayerInput& layer = in.layers[l];
        if (split_) return attend_spans(layer, t);
        const int64_t base = t * most_of_a_thread();
        const Share blocks = owned_[t].blocks, own{blocks.begin * s.kv_heads, blocks.end * s.kv_heads};
        deal(t, own, (int64_t)blocks_.size() * s.kv_heads, 1, [&](Share items) {
            for (int64_t i = items.begin; i < items.end; i++) {
                const Block& block = blocks_[i / s.kv_heads];
                const int head = (int)(i % s.kv_heads);
                const Spans spans = spans_of(layer, block);
                for (int n = 0; n < spans.count; n++)
                    attend(layer, block, head, spans.at(n), part(block, base, 0, n));
                for (int r = 0; r < block.count; r++)
                    merge(layer, block, base, 0, r,
                          w.attended + (int64_t)(block.row + r) * q_size +
                              head * group_ * s.head_dim);
            }
        });
    }

    // Threads take runs of spans, head by head and block by block.
    void attend_spans(const LayerInput& layer, int t) {
        int64_t total = 0;
        for (const Block& block : blocks_) total += (int64_t)spans_of(layer, block).count * s.kv_heads;
        const Share own = mine(total, t);
        int64_t before = 0;
        for (size_t b = 0; b < blocks_.size(); b++) {
            const Spans spans = spans_of(layer, blocks_[b]);
            const int64_t all = (int64_t)spans.count * s.kv_heads;
            const int64_t end = std::min(own.end - before, all);
            for (int64_t i = std::max<int64_t>(own.begin - before, 0); i < end; i++) {
                const int head = (int)(i / spans.count), n = (int)(i % spans.count);
                attend(layer, blocks_[b], head, spans.at(n), part(blocks_[b], begins_[b], head, n));
            }
            before += all;
        }
    }

    // One row's attention from its spans -> [heads, head_dim].
    float* merged(const LayerInput& layer, int row, int t) {
        float* out = (float*)w.scratch[t];
        size_t b = 0;
        while (row >= blocks_[b].row + blocks_[b].count) b++;
        for (int h = 0; h < s.kv_heads; h++)
            merge(layer, blocks_[b], begins_[b], h, row - blocks_[b].row,
                  out + h * group_ * s.head_dim);
        return out;
    }

    void head(int t) {
        const int64_t rows = logits_end_ - logits_begin_;
        if (!rows) return;
        const Activations from = prepare(t, s.hidden, rows, [&](const Activations& to, int i) {
            const int64_t row = places_[in.logit_rows[logits_begin_ + i] - first_];
            k.norm_quantise(x(row), m.norm.data(), s.norm_eps, to, i);
        });
        if (screened_) return screen(from, t);
        const int64_t width = (int64_t)m.head.groups * LANES;
        float* out = logits_ + logits_begin_ * width;
        deal(t, m.head.groups, 64, [&](Share part) {
            linear(m.head, part, from, {0, rows}, out, width, false, t);
            if (best_.empty()) return;
            const int64_t begin = part.begin * LANES;
            const int64_t size = std::min<int64_t>(part.end * LANES, s.vocab) - begin;
            for (int64_t i = 0; i < rows && size > 0; i++)
                best_[t * rows + i].meet(k, out + i * width, begin, size);
        });
    }

    // The largest logit of one row, without all others: see Screen.
    void screen(const Activations& from, int t) {
        const Screen& screen = *m.screen;
        const Share own = mine(m.head.groups, t);
        Best& best = best_[t];
        auto read = [&](int64_t g) {
            turns_[t].groups_read++;
            linear(m.head, {g, g + 1}, from, {0, 1}, logits_, 0, false, t);
            best.meet(k, logits_, g * LANES, std::min<int64_t>(LANES, s.vocab - g * LANES));
        };
        // (`linear` needs the scratch from its beginning on.)
        const Screen::Query query = screen.query(from, w.scratch[t] + group_scratch(s.hidden));
        k.coarse(screen.coarse(), (int)own.begin, (int)own.end, query.row, logits_);
        const int64_t begin = own.begin * LANES, end = std::min<int64_t>(own.end * LANES, s.vocab);
        if (begin < end) read((begin + k.argmax(logits_ + begin, end - begin)) / LANES);
        m.pool.barrier(t);
        float least = -HUGE_VALF;
        for (const Best& other : best_) least = std::max(least, other.value);
        m.pool.barrier(t);  // all have seen them as they were
        // What a row's coarse product has to reach, rounded down.
        least -= query.rest + 1e-6f * (std::fabs(least) + query.rest);
        auto next = [&](int64_t g) {
            return k.reaching(logits_, screen.bounds(), query.length, least, (int)g, (int)own.end);
        };
        for (int64_t g = next(own.begin); g < own.end; g = next(g + 1)) read(g);
    }

    Model& m;
    Workspace& w;
    const StepInput& in;
    const Shape& s;
    const Kernels& k;
    const int first_, rows_, threads_;
    const bool apart_;  // whether threads divide the rows, not the weights
    const int group_, q_size, kv_size, ld;
    std::vector<Block> blocks_;  // by their rows
    std::vector<int> tokens_, places_;  // a row's token of the pass, a token's row
    struct Owned {
        Share rows, blocks;
    };
    std::vector<Owned> owned_;  // of each thread; blocks only where rows are divided
    std::vector<int64_t> begins_;  // of each block's parts, where they are dealt out
    int64_t logits_begin_, logits_end_;
    bool split_;
    float* const logits_;
    const bool screened_;
    std::vector<Best> best_;  // [threads, rows of logits], if they are few
    // What is dealt out already of each phase, and at which phase each thread is.
    std::vector<std::atomic<int64_t>> dealt_;
    struct alignas(64) Turn {
        int value = 0;
        int64_t groups_read = 0;  // of the head, after its coarse copy
    };
    std::vector<Turn> turns_;
};

}  // namespace

void reserve_pass(Model& model, Workspace& space) {
    const int threads = model.pool.threads();
    space.reserve(model, placed(most_rows(threads), threads), 512 * threads);
}

void run_step(Model& model, Workspace& space, const StepInput& input) {
    if (!input.logits && !(model.screen && input.largest && input.tokens == 1 && input.logit_count == 1))
        throw std::invalid_argument("a step without logits is one row's, of a model with a screen");
    for (int first = 0, rows; first < input.tokens; first += rows) {
        const int threads = model.pool.choose();
        rows = std::min(most_rows(threads), input.tokens - first);
        Pass pass(model, space, input, first, rows, threads);
        model.pool.run([](void* p, int t) { ((Pass*)p)->work(t); }, &pass,
                       input.tokens <= FEW_ROWS);
        pass.find_largest();
        if (input.logits) continue;
        model.screen->judge(pass.groups_read());
        model.screen->learn(space.own[0]);
    }
}

}  // namespace kvist
