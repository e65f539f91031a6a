//! Work that waits for the kernel, away from the agent's one thread.

use std::future::pending;
use std::panic::resume_unwind;

use tokio::task::spawn_blocking;

use crate::error::Result;

/// Carries `operation` out on a thread where it may wait, to its end even if the caller gives up.
///
/// # Errors
///
/// Those of the operation.
pub async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match spawn_blocking(operation).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // It was cancelled, for the runtime ends.
            Err(_) => pending().await,
        },
    }
}
