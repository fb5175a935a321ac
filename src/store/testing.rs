//! A store that fails when it is told to, for the tests of whoever writes to one. It wraps a real store: what it
//! lets through happens there.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use super::Op;

/// How a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is refused and nothing happens.
    Refused,
    /// It is carried out and its answer is lost.
    AnswerLost,
}

/// Fails requests by a plan; without one passes all of them on.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// The next requests' faults, each used once.
    once: VecDeque<(Op, Fault)>,
    /// Operations that are refused until further notice.
    down: Vec<Op>,
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        Arc::new(Self { inner, plan: Mutex::default() })
    }

    /// Lets the next `times` requests of this kind fail.
    pub fn fail_next(&self, op: Op, fault: Fault, times: usize) {
        let faults = std::iter::repeat_n((op, fault), times);
        self.plan().once.extend(faults);
    }

    /// Refuses every request of these kinds until [`FaultyStore::recover`].
    pub fn take_down(&self, ops: &[Op]) {
        self.plan().down = ops.to_vec();
    }

    /// Forgets every plan.
    pub fn recover(&self) {
        *self.plan() = Plan::default();
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_fault(&self, op: Op) -> Option<Fault> {
        let mut plan = self.plan();
        if plan.down.contains(&op) {
            return Some(Fault::Refused);
        }
        let place = plan.once.iter().position(|(planned, _)| *planned == op)?;
        plan.once.remove(place).map(|(_, fault)| fault)
    }

    async fn disturb<T>(&self, op: Op, request: impl Future<Output = Result<T>>) -> Result<T> {
        match self.next_fault(op) {
            None => request.await,
            Some(Fault::Refused) => Err(injected(op)),
            Some(Fault::AnswerLost) => {
                request.await?;
                Err(injected(op))
            }
        }
    }
}

fn injected(op: Op) -> object_store::Error {
    object_store::Error::Generic { store: "FaultyStore", source: format!("{op} fails as planned").into() }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.disturb(Op::Put, self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.disturb(Op::Put, self.inner.put_multipart_opts(location, opts)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.disturb(Op::Get, self.inner.get_opts(location, options)).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.disturb(Op::Get, self.inner.get_ranges(location, ranges)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.next_fault(Op::Delete) {
            None => self.inner.delete_stream(locations),
            Some(Fault::Refused) => locations.and_then(|_| async { Err(injected(Op::Delete)) }).boxed(),
            Some(Fault::AnswerLost) => {
                self.inner.delete_stream(locations).and_then(|_| async { Err(injected(Op::Delete)) }).boxed()
            }
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.next_fault(Op::List) {
            None => self.inner.list(prefix),
            Some(_) => futures::stream::once(async { Err(injected(Op::List)) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.disturb(Op::List, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.inner.rename_opts(from, to, options).await
    }
}
