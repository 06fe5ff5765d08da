// Nets in plain JavaScript: forward pass, input gradient, PGD. Images are arrays of pixels in [0, 1], channel by channel.
"use strict";

// Φ and φ of the standard normal distribution, tabulated: GELU(x) = x·Φ(x). Between the nodes Φ is a cubic that has the
// right value and slope at both ends; its error is below 1e-11.
const NODES = 128, EDGE = 8;
const density = (x) => Math.exp(-0.5 * x * x) / Math.sqrt(2 * Math.PI);
const table = (() => {
  const h = 1 / NODES, values = new Float64Array(2 * EDGE * NODES + 1);
  const middle = EDGE * NODES;
  values[middle] = 0.5;
  for (let i = 1; i <= middle; i++) {
    const a = (i - 1) * h; // Simpson's rule over one interval
    const part = (h / 6) * (density(a) + 4 * density(a + h / 2) + density(a + h));
    values[middle + i] = values[middle + i - 1] + part;
    values[middle - i] = 1 - values[middle + i];
  }
  return values;
})();

function normal(x) {
  if (x >= EDGE) return 1;
  if (x <= -EDGE) return 0;
  const place = (x + EDGE) * NODES, i = Math.min(Math.floor(place), table.length - 2), t = place - i;
  const left = i / NODES - EDGE, h = 1 / NODES;
  const a = table[i], b = table[i + 1], da = h * density(left), db = h * density(left + h);
  return a + t * (da + t * (3 * (b - a) - 2 * da - db + t * (2 * (a - b) + da + db)));
}

function numbers(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return Float64Array.from(new Float32Array(bytes.buffer));
}

function decoded(layers) {
  return layers.map((layer) =>
    layer.weight ? { ...layer, weight: numbers(layer.weight), bias: numbers(layer.bias) } : layer);
}

// Calls visit(weight, input index, output index) for every product of a convolution.
function products(layer, visit) {
  const { channels, filters, size, stride, padding, side } = layer;
  const out = Math.floor((side + 2 * padding - size) / stride) + 1;
  for (let o = 0; o < filters; o++)
    for (let i = 0; i < channels; i++)
      for (let ky = 0; ky < size; ky++)
        for (let kx = 0; kx < size; kx++) {
          const weight = layer.weight[((o * channels + i) * size + ky) * size + kx];
          for (let y = 0; y < out; y++) {
            const row = y * stride + ky - padding;
            if (row < 0 || row >= side) continue;
            for (let x = 0; x < out; x++) {
              const column = x * stride + kx - padding;
              if (column >= 0 && column < side) visit(weight, (i * side + row) * side + column, (o * out + y) * out + x);
            }
          }
        }
}

// The products of a convolution as a matrix in compressed rows, made once: faster than the loops above.
function compiled(layer) {
  const out = Math.floor((layer.side + 2 * layer.padding - layer.size) / layer.stride) + 1;
  const rows = Array.from({ length: layer.filters * out * out }, () => []);
  products(layer, (weight, from, to) => rows[to].push([from, weight]));
  const starts = new Int32Array(rows.length + 1);
  rows.forEach((row, i) => (starts[i + 1] = starts[i] + row.length));
  const from = Int32Array.from(rows.flat().map((pair) => pair[0]));
  const weight = Float64Array.from(rows.flat().map((pair) => pair[1]));
  return { ...layer, starts, from, weight, area: out * out };
}

function ready(layers) {
  return decoded(layers).map((layer) => (layer.kind === "convolution" ? compiled(layer) : layer));
}

const FORWARD = {
  normalize: (layer, x) => x.map((value) => (value - layer.mean) / layer.std),
  convolution: (layer, x) => {
    const { starts, from, weight, area } = layer, values = new Float64Array(starts.length - 1);
    for (let i = 0; i < values.length; i++) {
      let sum = layer.bias[Math.floor(i / area)];
      for (let k = starts[i]; k < starts[i + 1]; k++) sum += weight[k] * x[from[k]];
      values[i] = sum;
    }
    return values;
  },
  gelu: (layer, x) => x.map((value) => value * normal(value)),
  pool: (layer, x) => {
    const side = layer.side, half = side / 2, values = new Float64Array(x.length / 4);
    for (let i = 0; i < x.length; i++) {
      const column = i % side, row = Math.floor(i / side) % side, channel = Math.floor(i / side / side);
      values[(channel * half + (row >> 1)) * half + (column >> 1)] += x[i] / 4;
    }
    return values;
  },
  linear: (layer, x) => {
    const values = Float64Array.from(layer.bias);
    for (let o = 0; o < values.length; o++)
      for (let i = 0; i < x.length; i++) values[o] += layer.weight[o * x.length + i] * x[i];
    return values;
  },
};

// From the gradient by a layer's output to the gradient by its input x.
const BACKWARD = {
  normalize: (layer, x, g) => g.map((value) => value / layer.std),
  convolution: (layer, x, g) => {
    const { starts, from, weight } = layer, values = new Float64Array(x.length);
    for (let i = 0; i < g.length; i++)
      for (let k = starts[i]; k < starts[i + 1]; k++) values[from[k]] += weight[k] * g[i];
    return values;
  },
  gelu: (layer, x, g) => g.map((value, i) => value * (normal(x[i]) + x[i] * density(x[i]))),
  pool: (layer, x, g) => {
    const side = layer.side, half = side / 2;
    return x.map((_, i) => {
      const column = i % side, row = Math.floor(i / side) % side, channel = Math.floor(i / side / side);
      return g[(channel * half + (row >> 1)) * half + (column >> 1)] / 4;
    });
  },
  linear: (layer, x, g) => {
    const values = new Float64Array(x.length);
    for (let o = 0; o < g.length; o++)
      for (let i = 0; i < x.length; i++) values[i] += layer.weight[o * x.length + i] * g[o];
    return values;
  },
};

function logits(net, image) {
  return net.reduce((x, layer) => FORWARD[layer.kind](layer, x), Float64Array.from(image));
}

function softmax(values) {
  const top = Math.max(...values), powers = values.map((value) => Math.exp(value - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

const best = (values) => values.indexOf(Math.max(...values));

// Gradient of the cross-entropy at the label, by the pixels.
function inputGradient(net, image, label) {
  const inputs = [Float64Array.from(image)];
  for (const layer of net) inputs.push(FORWARD[layer.kind](layer, inputs[inputs.length - 1]));
  let g = softmax(inputs.pop());
  g[label] -= 1;
  for (let i = net.length - 1; i >= 0; i--) g = BACKWARD[net[i].kind](net[i], inputs[i], g);
  return g;
}

// PGD under ℓ∞ from the image itself: `steps` steps of 2ε/steps along the sign of the gradient.
function attacked(net, image, label, epsilon, steps = 20) {
  let x = Float64Array.from(image);
  for (let step = 0; step < steps && epsilon > 0; step++) {
    const g = inputGradient(net, x, label);
    x = x.map((value, i) => {
      const moved = value + ((2 * epsilon) / steps) * Math.sign(g[i]);
      return Math.min(1, Math.max(0, Math.min(image[i] + epsilon, Math.max(image[i] - epsilon, moved))));
    });
  }
  return x;
}

// The smallest ε, to 1/512, at which that attack changes the decision; 0 if it is wrong already, null if none up to 0.5.
function smallestEpsilon(net, image, label) {
  const fooled = (epsilon) => best(logits(net, attacked(net, image, label, epsilon))) !== label;
  if (fooled(0)) return 0;
  if (!fooled(0.5)) return null;
  let low = 0, high = 0.5;
  for (let halving = 0; halving < 8; halving++) {
    const middle = (low + high) / 2;
    if (fooled(middle)) high = middle;
    else low = middle;
  }
  return high;
}
