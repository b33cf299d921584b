// The forward pass of adaptd/models/lean.py for a few positions, without Python between its operations.
//
// Between two products of a large target the caches are full of weights, so that each further operation of a framework costs
// tens of microseconds of cache misses and not the few that it takes by itself. Here a layer is its products and four loops.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "amx.h"
#include "attention.h"
#include "recall.h"
#include "words.h"

namespace adaptd {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// y = x W^T + b in the layout of oneDNN.
Tensor packed_product(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Maybe&, std::string_view, c10::List<std::optional<at::Scalar>>,
                        std::optional<std::string_view>)>();
  return op.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// x [..., in] of the weight's type; a weight [out, in] as it is stored.
Tensor stored_product(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  const int64_t in = weight.size(1), out = weight.size(0), rows = x.numel() / std::max<int64_t>(in, 1);
  const bool tiles = weight.scalar_type() == at::kBFloat16 && amx_takes(rows, in);
  const int64_t most = tiles || weight.scalar_type() == at::kFloat ? FEW_ROWS : FEW_BFLOAT_ROWS;
  if (rows > most || weight.stride(1) != 1) return at::linear(x, weight, bias);
  const Tensor given = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = out;
  const Tensor y = at::empty(shape, given.options());
  const Tensor added = bias ? bias->to(at::kFloat) : Tensor();
  const float* b = bias ? added.const_data_ptr<float>() : nullptr;
  if (weight.scalar_type() == at::kFloat) {
    const float* w = weight.const_data_ptr<float>();
    product(given.const_data_ptr<float>(), in, w, weight.stride(0), b, y.mutable_data_ptr<float>(), out, rows, out, in);
    return y;
  }
  std::vector<float> found(rows * out);
  const auto* w = weight.const_data_ptr<c10::BFloat16>();
  const auto* from = given.const_data_ptr<c10::BFloat16>();
  if (tiles)
    amx_product(from, in, w, weight.stride(0), b, found.data(), out, rows, out, in);
  else
    product(from, in, w, weight.stride(0), b, found.data(), out, rows, out, in);
  auto* to = y.mutable_data_ptr<c10::BFloat16>();
  for (int64_t i = 0; i < rows * out; ++i) to[i] = static_cast<c10::BFloat16>(found[i]);
  return y;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// See words.h: one round on the host, int32 [B, width].
Tensor round_words(const Tensor& tokens, const Tensor& accepted, const Tensor& proposals, const Tensor& target,
                   const Maybe& draft, const Maybe& p, const Tensor& greedy, const Maybe& offsets, int64_t k_top, int64_t k_tail,
                   int64_t k_draft, bool everywhere) {
  const int64_t batch = tokens.size(0), k = proposals.size(1);
  const Tensor held[] = {tokens.contiguous(), accepted.contiguous(), proposals.contiguous(), target.contiguous(), greedy.contiguous(),
                         draft ? draft->contiguous() : Tensor(), p ? p->contiguous() : Tensor(),
                         offsets ? offsets->contiguous() : Tensor()};
  const auto floats = [&](int i) { return held[i].defined() ? held[i].const_data_ptr<float>() : nullptr; };
  const Played played{held[0].const_data_ptr<int64_t>(), held[1].const_data_ptr<int64_t>(), held[2].const_data_ptr<int64_t>(),
                      floats(3), floats(5), floats(6), floats(7), held[4].const_data_ptr<bool>()};
  const Sizes sizes{k, target.size(2), draft ? draft->size(2) : 0, k_top, k_tail, k_draft, everywhere};
  const Tensor words = at::empty({batch, sizes.width()}, target.options().dtype(at::kInt));
  int32_t* to = words.mutable_data_ptr<int32_t>();
  at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) words_of(sizes, played, b, to + b * sizes.width());
  });
  return words;
}

// A linear layer, with what was learned beside it in float32: y = W x + b + up (s o down x), o the openness of x's row.
//
// With a gate, the last row of `down` is its w and the last column of `up` a bias, and s is 2 sigmoid(gain w x).
struct Linear : torch::CustomClassHolder {
  Linear(Tensor weight, Maybe bias, bool packed, Maybe down, Maybe up, double scaling, double gain)
      : weight(std::move(weight)), bias(std::move(bias)), down(std::move(down)), up(std::move(up)), packed(packed),
        scaling(static_cast<float>(scaling)), gain(static_cast<float>(gain)) {}

  // x [rows, in], each row's openness or none.
  Tensor operator()(const Tensor& x, const float* open) const {
    Tensor y = packed ? packed_product(x, weight, bias) : stored_product(x, weight, bias);
    if (!down) return y;
    const int64_t rows = x.size(0), rank = down->size(0), out = up->size(0);
    const Tensor wide = x.to(at::kFloat);
    y = y.to(at::kFloat);
    const Tensor low = at::empty({rows, rank}, wide.options());
    float* values = low.mutable_data_ptr<float>();
    const int64_t in = x.size(1);
    product(wide.const_data_ptr<float>(), in, down->const_data_ptr<float>(), down->stride(0), nullptr, values, rank, rows, rank, in);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = values + r * rank;
      float scale = scaling * (open ? open[r] : 1.0f);
      if (gain) {
        scale *= 2.0f * sigmoid(gain * row[rank - 1]);
        row[rank - 1] = 1.0f;
      }
      for (int64_t i = 0; i < rank; ++i) row[i] *= scale;
    }
    product<true>(values, rank, up->const_data_ptr<float>(), up->stride(0), nullptr, y.mutable_data_ptr<float>(), out, rows, out,
                  rank);
    return gain ? y : y.to(x.scalar_type());  // logits stay as they are
  }

  Tensor weight;
  Maybe bias, down, up;
  bool packed;
  float scaling, gain;
};

using LinearRef = c10::intrusive_ptr<Linear>;

// One layer: norm, attention, add, norm, gated feed-forward, add.
struct Layer : torch::CustomClassHolder {
  Layer(std::vector<LinearRef> read, LinearRef out, std::vector<LinearRef> units, LinearRef down, std::vector<Tensor> norms,
        std::vector<double> eps, std::vector<int64_t> sizes, double scale, bool gated)
      : read(std::move(read)), units(std::move(units)), out(std::move(out)), down(std::move(down)), norms(std::move(norms)),
        eps(std::move(eps)), heads(sizes[0]), shared_heads(sizes[1]), dim(sizes[2]), width(sizes[3]), always(sizes[4]),
        kind(sizes[5]), scale(static_cast<float>(scale)), gated(gated) {}

  std::vector<LinearRef> read, units;
  LinearRef out, down;
  std::vector<Tensor> norms;  // before, between, and of queries and keys where there are any
  std::vector<double> eps;
  int64_t heads, shared_heads, dim;
  int64_t width;   // of the feed-forward
  int64_t always;  // columns of it that no gate scales
  int64_t kind;    // of its mask
  float scale;
  bool gated;
};

using LayerRef = c10::intrusive_ptr<Layer>;

// What a pass is told: see `Decoder::forward`.
struct Pass {
  const int64_t *positions, *places;
  const float *cos, *sin, *open;  // `open` by position: one a row of activations
  int64_t batch, queries, rows, length, first;
  std::vector<int64_t> seen;  // cache positions that any query of a batch row may look at
};

template <class T>
const T* data(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

template <class T>
void norm_rows(const T* x, const Tensor& weight, double eps, T* y, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) norm(x + r * n, data<T>(weight), y + r * n, n, static_cast<float>(eps));
}

// The three parts of what `read` gave, as pointers with the distance of two rows.
template <class T>
struct Heads {
  Heads(const std::vector<Tensor>& read, const Layer& layer) {
    const int64_t sizes[] = {layer.heads * layer.dim, layer.shared_heads * layer.dim, layer.shared_heads * layer.dim};
    int64_t column = 0;
    for (int part = 0; part < 3; ++part) {
      const Tensor& from = read.size() == 1 ? read[0] : read[part];
      at[part] = data<T>(from) + (read.size() == 1 ? column : 0);
      apart[part] = from.size(1);
      column += sizes[part];
    }
  }
  const T* at[3];
  int64_t apart[3];
};

template <class T>
Tensor attention(const Layer& layer, const std::vector<Tensor>& read, const Pass& pass, const Tensor& mask, const Tensor& keys,
                 const Tensor& values, const Tensor& like) {
  const Heads<T> parts(read, layer);
  const int64_t dim = layer.dim, shared = layer.shared_heads, groups = layer.heads / shared, queries = pass.queries;
  const bool normed = layer.norms.size() > 2;
  const T* q_norm = normed ? data<T>(layer.norms[2]) : nullptr;
  const T* k_norm = normed ? data<T>(layer.norms[3]) : nullptr;
  const float q_eps = normed ? layer.eps[2] : 0.0f, k_eps = normed ? layer.eps[3] : 0.0f;
  T* key_store = keys.mutable_data_ptr<T>();
  T* value_store = values.mutable_data_ptr<T>();
  const int64_t capacity = keys.size(2);
  const Tensor found = at::empty({pass.rows, layer.heads * dim}, like.options());
  T* to = found.mutable_data_ptr<T>();
  at::parallel_for(0, pass.batch * shared, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> turned_queries(groups * queries * dim);
    std::vector<const T*> masks(groups * queries);
    std::vector<T*> outs(groups * queries);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / shared, head = task % shared;
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = b * queries + i, place = pass.places[(b * shared + head) * queries + i];
        const float *cos = pass.cos + pass.positions[row] * dim, *sin = pass.sin + pass.positions[row] * dim;
        turned(parts.at[1] + row * parts.apart[1] + head * dim, k_norm, k_eps, cos, sin, 1.0f, key_store + place * dim, dim);
        std::memcpy(value_store + place * dim, parts.at[2] + row * parts.apart[2] + head * dim, dim * sizeof(T));
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t m = g * queries + i, column = (head * groups + g) * dim;
          turned(parts.at[0] + row * parts.apart[0] + column, q_norm, q_eps, cos, sin, layer.scale,
                 turned_queries.data() + m * dim, dim);
          masks[m] = data<T>(mask) + row * pass.length;
          outs[m] = to + row * layer.heads * dim + column;
        }
      }
      const int64_t start = ((pass.first + b) * shared + head) * capacity * dim;
      attend(turned_queries.data(), groups * queries, key_store + start, value_store + start, masks.data(), pass.seen[b], dim,
             outs.data());
    }
  });
  return found;
}

template <class T>
Tensor activated(const Layer& layer, const std::vector<Tensor>& units, const Pass& pass, const Tensor& like) {
  const int64_t width = layer.width;
  const Tensor found = at::empty({pass.rows, width}, like.options());
  T* to = found.mutable_data_ptr<T>();
  const T* first = data<T>(units[0]);
  const int64_t apart = units[0].size(1);
  const T* second = units.size() == 1 ? first + width : data<T>(units[1]);
  const int64_t second_apart = units.size() == 1 ? apart : width;
  for (int64_t r = 0; r < pass.rows; ++r) {
    const T *x = first + r * apart, *times = second + r * second_apart;
    gated(x, times, 1.0f, to + r * width, layer.always);
    if (layer.always == width) continue;
    float open = pass.open ? pass.open[r] : 1.0f;
    if (layer.gated) open *= 2.0f * sigmoid(static_cast<float>(x[2 * width]));
    gated(x + layer.always, times + layer.always, open, to + r * width + layer.always, width - layer.always);
  }
  return found;
}

std::vector<Tensor> all(const std::vector<LinearRef>& layers, const Tensor& x, const float* open) {
  std::vector<Tensor> found;
  for (const auto& layer : layers) found.push_back((*layer)(x, open));
  return found;
}

struct Decoder : torch::CustomClassHolder {
  Decoder(std::vector<LayerRef> layers, Tensor norm, double eps, std::optional<LinearRef> head, Tensor cos, Tensor sin)
      : layers(std::move(layers)), norm(std::move(norm)), eps(eps), head(std::move(head)), cos(std::move(cos)),
        sin(std::move(sin)) {}

  // hidden [B, Q, H], overwritten; positions [B, Q]; masks [B, 1, Q, L] by kind of layer; keys and values
  // [slots, heads, capacity, dim] of each layer; places [B * heads * Q], the rows of a flattened store that are written;
  // openness [B, 1, 1]. Returns logits [B, Q or 1, V], or what the head reads where it is not among the layers here.
  Tensor forward(Tensor hidden, const Tensor& positions, const std::vector<Tensor>& masks, const std::vector<Tensor>& keys,
                 const std::vector<Tensor>& values, const Tensor& places, int64_t first, bool last_only, const Maybe& openness) {
    const at::NoGradGuard guard;
    hidden = hidden.contiguous();
    return hidden.scalar_type() == at::kFloat
               ? run<float>(hidden, positions, masks, keys, values, places, first, last_only, openness)
               : run<c10::BFloat16>(hidden, positions, masks, keys, values, places, first, last_only, openness);
  }

  template <class T>
  Tensor run(const Tensor& hidden, const Tensor& positions, const std::vector<Tensor>& masks, const std::vector<Tensor>& keys,
             const std::vector<Tensor>& values, const Tensor& places, int64_t first, bool last_only, const Maybe& openness) {
    const int64_t batch = hidden.size(0), queries = hidden.size(1), size = hidden.size(2), rows = batch * queries;
    const Tensor where = positions.contiguous(), into = places.contiguous();
    std::vector<float> open;
    if (openness) {
      const Tensor given = openness->to(at::kFloat).contiguous();
      for (int64_t r = 0; r < rows; ++r) open.push_back(data<float>(given)[r / queries]);
    }
    std::vector<Tensor> hiding;
    for (const auto& mask : masks) hiding.push_back(mask.contiguous());
    Pass pass{data<int64_t>(where), data<int64_t>(into), data<float>(cos), data<float>(sin), openness ? open.data() : nullptr,
              batch, queries, rows, hiding[0].size(3), first, {}};
    for (int64_t b = 0; b < batch; ++b) pass.seen.push_back(visible<T>(hiding, b, queries, pass.length));

    T* x = hidden.mutable_data_ptr<T>();
    const Tensor normed = at::empty({rows, size}, hidden.options());
    T* y = normed.mutable_data_ptr<T>();
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& layer = *layers[i];
      norm_rows(x, layer.norms[0], layer.eps[0], y, rows, size);
      const Tensor attended = attention<T>(layer, all(layer.read, normed, pass.open), pass, hiding[layer.kind], keys[i], values[i], hidden);
      add(x, data<T>((*layer.out)(attended, pass.open)), rows * size);
      norm_rows(x, layer.norms[1], layer.eps[1], y, rows, size);
      const Tensor active = activated<T>(layer, all(layer.units, normed, pass.open), pass, hidden);
      add(x, data<T>((*layer.down)(active, pass.open)), rows * size);
    }
    const int64_t kept = last_only ? 1 : queries;
    const Tensor last = at::empty({batch * kept, size}, hidden.options());
    std::vector<float> last_open;
    for (int64_t r = 0; r < batch * kept; ++r) {
      const int64_t from = last_only ? (r + 1) * queries - 1 : r;
      adaptd::norm(x + from * size, data<T>(norm), last.mutable_data_ptr<T>() + r * size, size, static_cast<float>(eps));
      if (openness) last_open.push_back(open[from]);
    }
    const Tensor found = head ? (**head)(last, openness ? last_open.data() : nullptr) : last;
    return found.view({batch, kept, -1});
  }

  template <class T>
  static int64_t visible(const std::vector<Tensor>& masks, int64_t b, int64_t queries, int64_t length) {
    int64_t most = 1;
    for (const auto& mask : masks)
      for (int64_t q = 0; q < queries; ++q) {
        const T* row = data<T>(mask) + (b * queries + q) * length;
        for (int64_t i = length; i > most; --i)
          if (static_cast<float>(row[i - 1]) == 0.0f) most = i;
      }
    return most;
  }

  std::vector<LayerRef> layers;
  Tensor norm;
  double eps;
  std::optional<LinearRef> head;
  Tensor cos, sin;
};

// History [N, L], length and slots [N]; key and count [sets, ways], tokens and probs [sets, ways, M]; best [domains x classes].
// Returns what `Recalled` has: ids and probs [N, S, M], weights and kinds [N, S].
std::tuple<Tensor, Tensor, Tensor, Tensor> recall_look(const Tensor& history, const Tensor& length, const Tensor& slots,
                                                       const Tensor& key, const Tensor& count, const Tensor& tokens,
                                                       const Tensor& probs, const Tensor& best, const Tensor& grid,
                                                       at::IntArrayRef orders, at::IntArrayRef echo, int64_t classes) {
  const int64_t rows = history.size(0), sources = static_cast<int64_t>(orders.size() + echo.size()), width = tokens.size(2);
  const Tensor text = history.contiguous();
  const RecallTable table{key.const_data_ptr<int64_t>(),       count.const_data_ptr<float>(), tokens.const_data_ptr<int32_t>(),
                          probs.const_data_ptr<c10::Half>(), key.size(0),                   key.size(1), width};
  Tensor ids = at::empty({rows, sources, width}, history.options()), kinds = at::empty({rows, sources}, history.options());
  Tensor found = at::empty({rows, sources, width}, grid.options()), weights = at::empty({rows, sources}, grid.options());
  int64_t* kind = kinds.mutable_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = length.const_data_ptr<int64_t>()[r * length.stride(0)];
    const int64_t slot = slots.const_data_ptr<int64_t>()[r * slots.stride(0)] * classes;
    recall_row(table, text.const_data_ptr<int64_t>() + r * text.size(1), text.size(1), at, orders, echo, classes - 1,
               ids.mutable_data_ptr<int64_t>() + r * sources * width, found.mutable_data_ptr<float>() + r * sources * width,
               kind + r * sources);
    for (int64_t s = r * sources; s < (r + 1) * sources; ++s) {
      kind[s] += slot;
      weights.mutable_data_ptr<float>()[s] = grid.const_data_ptr<float>()[best.const_data_ptr<int64_t>()[kind[s]]];
    }
  }
  return {ids, found, weights, kinds};
}

}  // namespace adaptd

TORCH_LIBRARY(adaptd, m) {
  using namespace adaptd;
  m.def("stored_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor", stored_product);
  m.def(
      "round_words(Tensor tokens, Tensor accepted, Tensor proposals, Tensor target, Tensor? draft, Tensor? p, Tensor greedy, "
      "Tensor? offsets, int k_top, int k_tail, int k_draft, bool everywhere) -> Tensor",
      round_words);
  m.def(
      "recall_look(Tensor history, Tensor length, Tensor slots, Tensor key, Tensor count, Tensor tokens, Tensor probs, Tensor best, "
      "Tensor grid, int[] orders, int[] echo, int classes) -> (Tensor, Tensor, Tensor, Tensor)",
      recall_look);
  m.class_<Linear>("Linear").def(torch::init<Tensor, Maybe, bool, Maybe, Maybe, double, double>());
  m.class_<Layer>("Layer").def(torch::init<std::vector<LinearRef>, LinearRef, std::vector<LinearRef>, LinearRef, std::vector<Tensor>,
                                           std::vector<double>, std::vector<int64_t>, double, bool>());
  m.class_<Decoder>("Decoder")
      .def(torch::init<std::vector<LayerRef>, Tensor, double, std::optional<LinearRef>, Tensor, Tensor>())
      .def("forward", &Decoder::forward);
}
