//! Loops compiled for the widest vector instructions of the machine that runs them.
//!
//! The compiler makes vector code of plain loops, but for the baseline's instructions alone. Nothing about a result depends
//! on what was found: no multiply-add is fused, and no sum is taken in another order than written.

/// Runs its body, and whatever is inlined into it, compiled for AVX-512, AVX2 or the baseline, as the machine has them.
/// A macro, because the body must be inlined into each of the versions: without that it is compiled for the baseline alone.
macro_rules! widest {
    ($($body:tt)+) => {
        pulp::Arch::new().dispatch($crate::widest::Body(#[inline(always)] || { $($body)+ }))
    };
}
pub(crate) use widest;

/// A body of [`widest`]. `FnMut`, because calling a closure by value goes through a function that is not inlined.
pub(crate) struct Body<F>(pub(crate) F);

impl<F: FnMut()> pulp::NullaryFnOnce for Body<F> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        (self.0)();
    }
}
