"""Deterministic synthetic waveforms (numpy float64 -> float32), reproducible without any file."""
import numpy as np
import torch


def synth(seconds: float, sr: int = 32000, kind: int = 0, channels: int = 1) -> torch.Tensor:
    """kind k: melody of 8 notes/2 s + harmonics + an LCG noise floor. Returns float32 [channels, T]."""
    n = int(round(seconds * sr))
    t = np.arange(n, dtype=np.float64) / sr
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12])
    notes = 48 + 3 * kind + scale[(np.floor(t * 4).astype(np.int64) * (kind + 3) + kind) % 8]
    f = 440. * 2. ** ((notes - 57) / 12.)
    ph = 2 * np.pi * np.cumsum(f) / sr
    env = 0.2 + 0.8 * np.exp(-3. * np.mod(t * 4., 1.))
    x = env * (np.sin(ph) + 0.5 * np.sin(2 * ph) + 0.25 * np.sin(3 * ph + 0.3))
    s = np.uint32(12345 + kind)
    out = np.empty(n, dtype=np.float64)
    a, c = np.uint64(1664525), np.uint64(1013904223)
    v = np.uint64(s)
    # vectorised LCG: v_k = a^k v_0 + c (a^k - 1)/(a - 1)  mod 2^32, done by doubling
    seq = np.empty(n, dtype=np.uint64)
    m = np.uint64(0xFFFFFFFF)
    seq[:1] = (a * v + c) & m
    ak, ck, k = a, c, 1
    while k < n:
        w = min(k, n - k)
        seq[k:k + w] = (ak * seq[:w] + ck) & m
        ck = (ak * ck + ck) & m
        ak = (ak * ak) & m
        k *= 2
    noise = seq.astype(np.float64) / 2. ** 32 - 0.5
    y = 0.25 * x + 0.05 * noise
    ys = [y if ch == 0 else 0.6 * np.roll(y, 137 * ch) + 0.1 * np.sin(2 * np.pi * (200. + 50. * ch) * t)
          for ch in range(channels)]
    return torch.from_numpy(np.stack(ys).astype(np.float32))
