//! Loops compiled for the widest vector instructions of the machine that runs them.
//!
//! No fused multiply-adds and no sums in another order than written: the result does not depend on what was found.

/// Runs its body, and whatever is inlined into it, compiled for AVX-512, AVX2 or the baseline, as the machine has them.
/// A macro, because the body must be inlined into each of the versions: without that it is compiled for the baseline alone.
macro_rules! widest {
    ($($body:tt)+) => {
        pulp::Arch::new().dispatch($crate::eval::wide::Body(#[inline(always)] || { $($body)+ }))
    };
}
pub(super) use widest;

/// A body of [`widest`]. `FnMut`, because calling a closure by value goes through a function that is not inlined.
pub(super) struct Body<F>(pub(super) F);

impl<F: FnMut()> pulp::NullaryFnOnce for Body<F> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        (self.0)();
    }
}
