#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvist {
namespace {

struct Share {
    int begin, end;
};

// Thread t's part of n equal pieces of work.
Share share(int64_t n, int t, int threads) {
    return {(int)(n * t / threads), (int)(n * (t + 1) / threads)};
}

// One pass over the weights for the rows [first, first + rows) of a step.
class Pass {
  public:
    Pass(Model& model, Workspace& space, const StepInput& input, int first, int rows)
        : m(model), w(space), in(input), s(model.shape), k(model.kernels), first_(first),
          rows_(rows), threads_(model.pool.threads()), q_size(s.heads * s.head_dim),
          kv_size(s.kv_heads * s.head_dim), ld(q_size + 2 * kv_size) {
        sequence_.resize(rows), position_.resize(rows);
        alone_ = true;
        for (int b = 0; b < in.sequences; b++) {
            const int begin = std::max(in.query_starts[b], first);
            const int end = std::min(in.query_starts[b + 1], first + rows);
            alone_ = alone_ && end - begin <= 1;
            for (int i = begin; i < end; i++) {
                sequence_[i - first] = b;
                position_[i - first] = in.kv_lens[b] - (in.query_starts[b + 1] - i);
            }
        }
        const int64_t* rows_end = in.logit_rows + in.logit_count;
        logits_begin_ = std::lower_bound(in.logit_rows, rows_end, first) - in.logit_rows;
        logits_end_ = std::lower_bound(in.logit_rows, rows_end, first + rows) - in.logit_rows;
        wide_ = k.wide_from && rows >= k.wide_from;
    }

    void work(int t) {
        begin(t);
        m.pool.barrier(t);
        for (int l = 0; l < s.layers; l++) layer(l, t);
        head(t);
    }

  private:
    Share mine(int64_t n, int t) const { return share(n, t, threads_); }

    float* x(int row) const { return w.x + (int64_t)row * s.hidden; }
    float* q(int row) const { return w.projected + (int64_t)row * ld; }
    float* key(int row) const { return q(row) + q_size; }
    float* value(int row) const { return key(row) + kv_size; }
    const float* rotation(int row) const { return w.rotation + (int64_t)row * s.head_dim; }

    // Embeddings, and the cosines and sines of all rows.
    void begin(int t) {
        const Share rows = mine(rows_, t);
        const int64_t bytes = stored_row_bytes(m.embedding_type, s.hidden);
        for (int r = rows.begin; r < rows.end; r++) {
            const int64_t i = first_ + r;
            if (in.embeddings) memcpy(x(r), in.embeddings + i * s.hidden, s.hidden * 4);
            else read_row(m.embedding_type, m.embedding + in.token_ids[i] * bytes, s.hidden, x(r));
            float* to = w.rotation + (int64_t)r * s.head_dim;
            for (int c = 0; c < s.head_dim / 2; c++) {
                const float angle = (float)in.rotations[i] * m.frequencies[c];
                to[c] = std::cos(angle) * s.rotation_scale;
                to[s.head_dim / 2 + c] = std::sin(angle) * s.rotation_scale;
            }
        }
    }

    // Rows as a matrix takes them: each thread makes all when they are few, else its own part.
    template <typename Make>
    Activations prepare(int t, int columns, int rows, Make make) {
        const bool few = rows <= FEW_ROWS;
        Activations to = few ? w.own[t] : w.shared;
        to.columns = columns;
        if (few || !wide_ || rows < k.wide_from) to.wide = nullptr;
        const Share part = few ? Share{0, rows} : mine(rows, t);
        for (int r = part.begin; r < part.end; r++) make(to, r);
        if (!few) m.pool.barrier(t);
        return to;
    }

    Activations normed(int t, const std::vector<float>& weight) {
        return prepare(t, s.hidden, rows_, [&](const Activations& to, int r) {
            k.norm_quantise(x(r), weight.data(), s.norm_eps, to, r);
        });
    }

    void linear(const Matrix& matrix, Share part, const Activations& from, int rows, float* out,
                int64_t out_ld, bool add, int t) {
        if (part.begin < part.end)
            k.linear(matrix, part.begin, part.end, from, rows, out, out_ld, add, w.scratch[t]);
    }

    void layer(int l, int t) {
        const Layer& layer = m.layers[l];
        project(layer, t);
        m.pool.barrier(t);
        attention(l, t);
        m.pool.barrier(t);
        const Activations attended = prepare(t, q_size, rows_, [&](const Activations& to, int r) {
            if (split()) merge_parts(r, t);
            const float* from = split() ? merged(t) : w.attended + (int64_t)r * q_size;
            k.quantise(from, to, r);
        });
        const Matrix& output = layer.matrices[O_PROJ];
        linear(output, mine(output.groups, t), attended, rows_, w.x, s.hidden, true, t);
        m.pool.barrier(t);
        mlp(layer, t);
    }

    void project(const Layer& layer, int t) {
        const Activations from = normed(t, layer.input_norm);
        const Matrix* parts = layer.matrices;
        const Share all = mine(parts[Q_PROJ].groups + parts[K_PROJ].groups + parts[V_PROJ].groups, t);
        int before = 0;
        for (int slot = Q_PROJ; slot <= V_PROJ; slot++) {
            const int groups = parts[slot].groups;
            const Share part{std::clamp(all.begin - before, 0, groups),
                             std::clamp(all.end - before, 0, groups)};
            linear(parts[slot], part, from, rows_, w.projected + before * LANES, ld, false, t);
            before += groups;
        }
    }

    void mlp(const Layer& layer, int t) {
        const Activations from = normed(t, layer.post_norm);
        const Matrix &gate = layer.matrices[GATE], &down = layer.matrices[DOWN];
        const Share blocks = mine(s.intermediate / BLOCK, t);
        Activations to = w.intermediate;
        if (!wide_) to.wide = nullptr;
        if (blocks.begin < blocks.end)
            k.gate_up(gate, layer.matrices[UP], blocks.begin, blocks.end, from, rows_, to,
                      w.scratch[t]);
        m.pool.barrier(t);
        linear(down, mine(down.groups, t), to, rows_, w.x, s.hidden, true, t);
        m.pool.barrier(t);
    }

    // Attention. Tokens are fewer than threads: each takes a part of every context. Otherwise each
    // takes some tokens of some heads. Where no two tokens are of one sequence, whoever attends for
    // a head also writes its new key and value, and no other thread reads those.
    bool split() const { return rows_ < threads_ && alone_; }

    HeadPlane plane(int l, int row, int head, bool of_values) const {
        const int64_t offset = head * in.head_stride * (in.element == F32 ? 4 : 2);
        void* base = (uint8_t*)(of_values ? in.values : in.keys)[l] + offset;
        const int32_t* table = in.tables[l] + sequence_[row] * in.table_width;
        return {base, table, (int32_t)in.block_size, in.block_stride, in.token_stride,
                (Element)in.element};
    }

    int first_seen(int l, int row) const {
        return in.windows[l] ? std::max(0, position_[row] + 1 - in.windows[l]) : 0;
    }

    void turn(float* vector, const std::vector<float>& norm, int row, float scale) {
        if (s.qk_norm) k.norm(vector, norm.data(), s.norm_eps, s.head_dim);
        k.rotate(vector, rotation(row), s.head_dim, scale);
    }

    void write(int l, int row, int head) {
        float* vector = key(row) + head * s.head_dim;
        turn(vector, m.layers[l].k_norm, row, 1.f);
        k.store(plane(l, row, head, false), position_[row], vector, s.head_dim);
        k.store(plane(l, row, head, true), position_[row], value(row) + head * s.head_dim,
                s.head_dim);
    }

    void attend(int l, int row, int head, Share range, const float* from, float* out, float* max,
                float* weight, int t) {
        const int group = s.heads / s.kv_heads;
        k.attend({plane(l, row, head, false), plane(l, row, head, true), from, out, max, weight,
                  w.scores + t * m.scores_of_thread(w.context), group, s.head_dim, range.begin,
                  range.end});
    }

    void attention(int l, int t) {
        if (split()) {
            for (int r = 0; r < rows_; r++) attend_part(l, r, t);
            return;
        }
        if (!alone_) {
            const Share rows = mine(rows_, t);
            for (int r = rows.begin; r < rows.end; r++)
                for (int h = 0; h < s.kv_heads; h++) write(l, r, h);
            m.pool.barrier(t);
        }
        // Neighbouring rows see about as much, so dealing them out in turn is fair.
        const int items = rows_ * s.kv_heads;
        for (int i = t; i < items; i += threads_) attend_whole(l, i / s.kv_heads, i % s.kv_heads, t);
    }

    void attend_whole(int l, int row, int head, int t) {
        const int group = s.heads / s.kv_heads, d = s.head_dim;
        if (alone_) write(l, row, head);
        float* queries = q(row) + head * group * d;
        turn_queries(l, queries, row, group);
        float* out = w.attended + (int64_t)row * q_size + head * group * d;
        float max[64], weight[64];
        attend(l, row, head, {first_seen(l, row), position_[row] + 1}, queries, out, max, weight, t);
        for (int g = 0; g < group; g++) {
            const float* part = out + g * d;
            k.merge(&part, max + g, weight + g, 1, d, out + g * d);
        }
    }

    void turn_queries(int l, float* queries, int row, int count) {
        const float scale = 1.f / std::sqrt((float)s.head_dim);
        for (int g = 0; g < count; g++)
            turn(queries + g * s.head_dim, m.layers[l].q_norm, row, scale);
    }

    float* part(int t, int row) const { return w.parts + ((int64_t)t * rows_ + row) * q_size; }
    float* part_max(int t, int row) const { return w.part_max + ((int64_t)t * rows_ + row) * s.heads; }
    float* part_weight(int t, int row) const {
        return w.part_weight + ((int64_t)t * rows_ + row) * s.heads;
    }

    void attend_part(int l, int row, int t) {
        const int group = s.heads / s.kv_heads, end = position_[row] + 1, first = first_seen(l, row);
        const Share runs = mine((end - first + 15) / 16, t);
        const Share range{first + 16 * runs.begin, std::min(end, first + 16 * runs.end)};
        float* queries = (float*)w.scratch[t];  // every thread turns all queries for itself
        memcpy(queries, q(row), q_size * 4);
        turn_queries(l, queries, row, s.heads);
        const bool last = runs.begin < runs.end && range.end == end;
        for (int h = 0; h < s.kv_heads; h++) {
            if (last) write(l, row, h);
            attend(l, row, h, range, queries + h * group * s.head_dim,
                   part(t, row) + h * group * s.head_dim, part_max(t, row) + h * group,
                   part_weight(t, row) + h * group, t);
        }
    }

    float* merged(int t) const { return (float*)w.scratch[t]; }

    void merge_parts(int row, int t) {
        for (int h = 0; h < s.heads; h++) {
            const float* parts[64];
            float max[64], weight[64];
            for (int p = 0; p < threads_; p++) {
                parts[p] = part(p, row) + h * s.head_dim;
                max[p] = part_max(p, row)[h], weight[p] = part_weight(p, row)[h];
            }
            k.merge(parts, max, weight, threads_, s.head_dim, merged(t) + h * s.head_dim);
        }
    }

    void head(int t) {
        const int rows = (int)(logits_end_ - logits_begin_);
        if (!rows) return;
        const Activations from = prepare(t, s.hidden, rows, [&](const Activations& to, int i) {
            const int row = (int)in.logit_rows[logits_begin_ + i] - first_;
            k.norm_quantise(x(row), m.norm.data(), s.norm_eps, to, i);
        });
        const int64_t width = (int64_t)m.head.groups * LANES;
        linear(m.head, mine(m.head.groups, t), from, rows, in.logits + logits_begin_ * width, width,
               false, t);
    }

    Model& m;
    Workspace& w;
    const StepInput& in;
    const Shape& s;
    const Kernels& k;
    const int first_, rows_, threads_, q_size, kv_size, ld;
    std::vector<int> sequence_, position_;
    int64_t logits_begin_, logits_end_;
    bool alone_, wide_;
};

}  // namespace

void run_step(Model& model, Workspace& space, const StepInput& input) {
    int32_t context = 0;
    for (int b = 0; b < input.sequences; b++) context = std::max(context, input.kv_lens[b]);
    for (int first = 0; first < input.tokens; first += PASS_ROWS) {
        const int rows = std::min(PASS_ROWS, input.tokens - first);
        space.reserve(model, rows, context);
        Pass pass(model, space, input, first, rows);
        model.pool.run([](void* p, int t) { ((Pass*)p)->work(t); }, &pass);
    }
}

}  // namespace kvist
