//! Points that the tests measure, and what numpy 2.4.6 and scikit-learn 1.9.1 say of them.
//!
//! ```python
//! import numpy as np
//! from sklearn.linear_model import LogisticRegression, Ridge
//! from sklearn.preprocessing import StandardScaler
//! from sklearn.metrics import r2_score
//! i = np.arange(120)[:, None]; j = np.arange(6)[None, :]; y = np.arange(120) % 3
//! X = (np.sin(1.3*i + 2.1*j) + 0.9*(j % 3 == y[:, None]) + 0.5*np.cos(0.37*i*(j+1))).astype(np.float32).astype(float)
//! Y = np.stack([np.tanh(X[:,0] + X[:,1]), X[:,2]*X[:,3], X[:,4] - 0.3*X[:,5], np.sin(3*X[:,0])], 1)
//! Y = Y.astype(np.float32).astype(float)
//! b, q = slice(0, 60), slice(60, 120)
//! s = StandardScaler().fit(X[b])
//! m = LogisticRegression(C=1, tol=1e-10, max_iter=10000).fit(s.transform(X[b]), y[b])
//! print(m.score(s.transform(X[q]), y[q]), (m.coef_**2).sum())                       # LINEAR, WEIGHTS
//! A, B = X - X.mean(0), Y - Y.mean(0); F = np.linalg.norm
//! print(F(B.T @ A)**2 / F(A.T @ A) / F(B.T @ B))                                    # CKA
//! r = Ridge(alpha=1e-2*60).fit(s.transform(X[b]), Y[b])
//! print(r2_score(Y[q], r.predict(s.transform(X[q])), multioutput='variance_weighted')) # RECOVERABILITY
//! n = lambda a: a / F(a, axis=1, keepdims=True)
//! D = ((n(X)[:, None] - n(X)[None])**2).sum(-1)
//! print(np.log(np.exp(-2 * D[np.triu_indices(120, 1)]).mean()))                     # UNIFORMITY
//! print(((n(X)[:-1] - n(X)[1:])**2).sum(1).mean())                                  # ALIGNMENT
//! p = np.linalg.svd(X, compute_uv=False); p /= p.sum()
//! print(np.exp(-(p * np.log(p)).sum()))                                             # RANK
//! def near(a):
//!     S = n(a) @ n(a).T; np.fill_diagonal(S, -9); return [set(np.argsort(-S[t])[:10]) for t in range(120)]
//! print(np.mean([len(u & v) / 10 for u, v in zip(near(X), near(Y))]))               # OVERLAP
//! S = n(Y) @ n(Y).T; o = (S.sum(1) - 1) / 119
//! e = lambda N: sum(S[t, list(N[t])].mean() - o[t] for t in range(120))
//! print(e(near(X)) / e(near(Y)))                                                    # RETENTION
//! ```

use super::Embeddings;
use super::split::Split;

pub const LINEAR: f64 = 0.5666666666666667;
pub const WEIGHTS: f64 = 1.196426586376915;
pub const CKA: f64 = 0.6480199192274606;
pub const RECOVERABILITY: f64 = 0.5404695012001282;
pub const UNIFORMITY: f64 = -1.9565336782787799;
pub const ALIGNMENT: f64 = 1.529935538478727;
pub const RANK: f64 = 4.947328380168926;
pub const OVERLAP: f64 = 0.425;
pub const RETENTION: f64 = 0.7215055159335483;

pub const ROWS: usize = 120;

/// `X [120, 6]`
pub fn points() -> Embeddings {
    let value = |i: usize, j: usize| {
        let own = if j % 3 == i % 3 { 0.9 } else { 0.0 };
        let (i, j) = (i as f64, j as f64);
        ((1.3 * i + 2.1 * j).sin() + own + 0.5 * (0.37 * i * (j + 1.0)).cos()) as f32
    };
    let data = (0..ROWS).flat_map(|i| (0..6).map(move |j| value(i, j))).collect();
    Embeddings::new(ROWS, 6, data)
}

/// `Y [120, 4]`: the same points in another, only partly linearly related space.
pub fn other_points() -> Embeddings {
    let points = points();
    let data = (0..ROWS).flat_map(|i| {
        let x: Vec<f64> = points.row(i).iter().map(|&value| f64::from(value)).collect();
        [(x[0] + x[1]).tanh(), x[2] * x[3], x[4] - 0.3 * x[5], (3.0 * x[0]).sin()]
    });
    Embeddings::new(ROWS, 4, data.map(|value| value as f32).collect())
}

pub fn labels() -> Vec<u32> {
    (0..ROWS as u32).map(|i| i % 3).collect()
}

/// The first half against the second.
pub fn halves() -> Split {
    Split { bank: (0..60).collect(), queries: (60..120).collect() }
}
