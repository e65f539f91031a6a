//! How much of something goes through a device in a second.
//!
//! A bucket is filled with tokens at a steady rate up to its burst, and what goes through takes tokens out: one for each
//! byte, or one for each packet or request. What is larger than the burst waits until the bucket is full, and leaves it in
//! debt. So in any time as much goes through as the rate allows for, and one burst on top, or one request if that is more.
//!
//! A [`RateLimiter`] has the two buckets of one direction or disk, and a timer that wakes its thread when there is enough in
//! them. It belongs to the device: a driver that resets it does not get a full bucket.

use std::num::NonZeroU64;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayu_vmm_api::RateLimit;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use crate::error::{Error, Result};

const NANOSECONDS_PER_SECOND: u64 = 1_000_000_000;
const NANOSECONDS_PER_MILLISECOND: u64 = 1_000_000;

/// A bucket, as the time when it will be full. All times are in nanoseconds, on a clock that does not go back. Arithmetic
/// saturates, at 584 years.
#[derive(Debug)]
struct TokenBucket {
    /// Tokens that come in a second.
    rate: NonZeroU64,
    /// How long it takes from empty to full.
    burst: u64,
    full_at: u64,
}

impl TokenBucket {
    /// A full one. It holds at least one token.
    fn new(rate: NonZeroU64, burst_ms: u32) -> Self {
        let mut bucket = Self { rate, burst: u64::from(burst_ms) * NANOSECONDS_PER_MILLISECOND, full_at: 0 };
        bucket.burst = bucket.burst.max(bucket.cost(1));
        bucket
    }

    /// How long it takes until so many tokens have come; rather too long than too short.
    fn cost(&self, tokens: u64) -> u64 {
        tokens.saturating_mul(NANOSECONDS_PER_SECOND).div_ceil(self.rate.get())
    }

    /// How long it takes until so many may be taken.
    fn wait(&self, tokens: u64, now: u64) -> u64 {
        let missing = self.full_at.saturating_sub(now);
        missing.saturating_add(self.cost(tokens).min(self.burst)).saturating_sub(self.burst)
    }

    /// Takes them, whether they are there or not.
    fn take(&mut self, tokens: u64, now: u64) {
        self.full_at = self.full_at.max(now).saturating_add(self.cost(tokens));
    }

    /// Of what was last taken, only so many were used.
    fn correct(&mut self, taken: u64, used: u64) {
        self.full_at = self.full_at.saturating_sub(self.cost(taken)).saturating_add(self.cost(used));
    }
}

/// What one direction or disk may carry. Handles are the same limiter; [`RateLimiter::default`] is no limit.
#[derive(Clone, Default)]
pub struct RateLimiter(Option<Arc<Mutex<Limited>>>);

struct Limited {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    /// Where its clock begins.
    start: Instant,
    /// Nothing is to be tried before.
    until: u64,
    /// Expires then.
    timer: TimerFd,
}

impl RateLimiter {
    /// One with full buckets.
    ///
    /// # Errors
    /// The kernel has no timer left.
    pub fn new(limit: &RateLimit) -> Result<Self> {
        let bucket = |rate: Option<NonZeroU64>| rate.map(|rate| TokenBucket::new(rate, limit.burst_ms));
        let (bytes, operations) = (bucket(limit.bandwidth), bucket(limit.operations));
        if bytes.is_none() && operations.is_none() {
            return Ok(Self::default());
        }
        let timer = TimerFd::new().map_err(|error| Error::RateLimit(error.into()))?;
        let limited = Limited { bytes, operations, start: Instant::now(), until: 0, timer };
        Ok(Self(Some(Arc::new(Mutex::new(limited)))))
    }

    /// Has `epoll` report `token` whenever there may be enough again. Once for each time; nothing has to be read. What somebody
    /// before has waited for does not count any more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(&self, epoll: &Epoll, token: u64) -> Result<()> {
        let Some(mut limited) = self.limited() else { return Ok(()) };
        limited.until = 0;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        epoll.ctl(ControlOperation::Add, limited.timer.as_raw_fd(), event).map_err(Error::EventFd)
    }

    /// Whether the timer is still to come. A kick or a packet meanwhile makes no difference.
    pub fn is_waiting(&self) -> bool {
        self.limited().is_some_and(|limited| limited.now() < limited.until)
    }

    /// Whether an operation with so many bytes may be done now. If not, the timer says when.
    pub fn admit(&self, bytes: usize) -> bool {
        let Some(mut limited) = self.limited() else { return true };
        let now = limited.now();
        let wait = limited.wait(bytes as u64, now);
        if wait > 0 {
            limited.until = now.saturating_add(wait);
            // A wait that nothing ends would be one for ever.
            return limited.timer.reset(Duration::from_nanos(wait), None).is_err();
        }
        limited.take(bytes as u64, now);
        true
    }

    /// Of what was last admitted, only so many bytes were used.
    pub fn correct(&self, admitted: usize, used: usize) {
        if let Some(mut limited) = self.limited() {
            limited.correct(admitted as u64, used as u64, 1);
        }
    }

    /// What was last admitted was not done.
    pub fn cancel(&self, admitted: usize) {
        if let Some(mut limited) = self.limited() {
            limited.correct(admitted as u64, 0, 0);
        }
    }

    fn limited(&self) -> Option<MutexGuard<'_, Limited>> {
        self.0.as_ref().map(|limited| limited.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Limited {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wait(&self, bytes: u64, now: u64) -> u64 {
        let of = |bucket: &Option<TokenBucket>, tokens| bucket.as_ref().map_or(0, |b| b.wait(tokens, now));
        of(&self.bytes, bytes).max(of(&self.operations, 1))
    }

    fn take(&mut self, bytes: u64, now: u64) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens, now);
            }
        }
    }

    fn correct(&mut self, taken: u64, used: u64, operations: u64) {
        for (bucket, taken, used) in [(&mut self.bytes, taken, used), (&mut self.operations, 1, operations)] {
            if let Some(bucket) = bucket {
                bucket.correct(taken, used);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = NANOSECONDS_PER_SECOND;

    fn bucket(rate: u64, burst_ms: u32) -> TokenBucket {
        TokenBucket::new(rate.try_into().unwrap(), burst_ms)
    }

    fn limit(bandwidth: u64, operations: u64, burst_ms: u32) -> RateLimit {
        RateLimit { bandwidth: NonZeroU64::new(bandwidth), operations: NonZeroU64::new(operations), burst_ms }
    }

    /// Takes so many, if they may be taken.
    fn admit(bucket: &mut TokenBucket, tokens: u64, now: u64) -> bool {
        let admitted = bucket.wait(tokens, now) == 0;
        if admitted {
            bucket.take(tokens, now);
        }
        admitted
    }

    #[test]
    fn a_full_bucket_gives_its_burst_and_then_what_comes_in() {
        let mut bucket = bucket(1000, 500);
        assert!(admit(&mut bucket, 400, 0));
        assert!(admit(&mut bucket, 100, 0));
        assert_eq!(bucket.wait(1, 0), SECOND / 1000);
        assert!(!admit(&mut bucket, 1, SECOND / 1000 - 1));
        assert!(admit(&mut bucket, 1, SECOND / 1000));
        assert_eq!(bucket.wait(100, SECOND / 1000), SECOND / 10);
    }

    #[test]
    fn an_idle_bucket_holds_no_more_than_its_burst() {
        let mut bucket = bucket(1000, 1000);
        assert!(admit(&mut bucket, 1000, 100 * SECOND));
        assert!(!admit(&mut bucket, 1, 100 * SECOND));
    }

    #[test]
    fn what_is_larger_than_the_burst_wants_a_full_bucket_and_leaves_debt() {
        let mut bucket = bucket(1000, 1000);
        assert!(admit(&mut bucket, 1, 0));
        assert_eq!(bucket.wait(5000, 0), SECOND / 1000);
        assert!(admit(&mut bucket, 5000, SECOND));
        // Four seconds of debt, and the time in which the one token comes.
        assert_eq!(bucket.wait(1, SECOND), 4 * SECOND + SECOND / 1000);
        assert_eq!(bucket.wait(1000, SECOND), 5 * SECOND);
    }

    #[test]
    fn the_smallest_bucket_holds_one_token() {
        let mut bucket = bucket(1, 1);
        assert!(admit(&mut bucket, 1, 0));
        assert_eq!(bucket.wait(1, 0), SECOND);
    }

    #[test]
    fn what_was_not_used_comes_back() {
        let mut bucket = bucket(1000, 1000);
        bucket.take(1000, 7);
        bucket.correct(1000, 10);
        assert!(admit(&mut bucket, 990, 7));
        assert!(!admit(&mut bucket, 1, 7));
    }

    #[test]
    fn the_largest_numbers_there_are_do_no_harm() {
        for rate in [1, u64::MAX] {
            let mut bucket = bucket(rate, u32::MAX);
            for now in [0, u64::MAX / 2, u64::MAX] {
                bucket.take(u64::MAX, now);
                bucket.correct(u64::MAX, 0);
                bucket.correct(0, u64::MAX);
                assert_eq!(bucket.wait(1, u64::MAX), 0);
            }
        }
    }

    #[test]
    fn both_buckets_have_to_have_enough_and_neither_pays_for_the_other() {
        let limiter = RateLimiter::new(&limit(1_000_000, 1, 1000)).unwrap();
        assert!(limiter.admit(10));
        assert!(!limiter.admit(10), "the second operation");
        assert!(limiter.is_waiting());
        let limited = limiter.limited().unwrap();
        let bytes = limited.bytes.as_ref().unwrap();
        assert!(bytes.full_at <= limited.now() + bytes.cost(10), "the refused one has not paid");
    }

    #[test]
    fn without_a_limit_everything_is_admitted() {
        for limiter in [RateLimiter::default(), RateLimiter::new(&limit(0, 0, 1000)).unwrap()] {
            assert!(limiter.0.is_none());
            assert!((0..100).all(|_| limiter.admit(usize::MAX)));
            assert!(!limiter.is_waiting());
        }
    }

    #[test]
    fn the_timer_wakes_who_was_refused_and_nobody_else() {
        let epoll = Epoll::new().unwrap();
        let limiter = RateLimiter::new(&limit(0, 100, 10)).unwrap();
        limiter.watch(&epoll, 7).unwrap();
        let mut events = [EpollEvent::default(); 2];
        assert!(limiter.admit(1));
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);

        while limiter.admit(1) {}

        assert_eq!(epoll.wait(30_000, &mut events).unwrap(), 1);
        assert_eq!(events[0].data(), 7);
        assert!(!limiter.is_waiting() && limiter.admit(1));
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0, "once");
    }

    #[test]
    fn what_was_canceled_costs_nothing_and_what_was_shorter_costs_less() {
        let limiter = RateLimiter::new(&limit(1000, 1, 1000)).unwrap();
        for _ in 0..100 {
            assert!(limiter.admit(1000));
            limiter.cancel(1000);
        }
        assert!(limiter.admit(1000));
        limiter.correct(1000, 1);
        let limited = limiter.limited().unwrap();
        let now = limited.now();
        assert!(limited.bytes.as_ref().unwrap().full_at <= now + SECOND / 1000);
        assert!(limited.operations.as_ref().unwrap().wait(1, now) > 0);
    }

    proptest! {
        /// In no window more than its time allows for, and one burst, or one request that is larger.
        #[test]
        fn no_window_has_more_than_it_may(
            rate in 1_u64..10_000_000_000,
            burst_ms in 1_u32..5000,
            requests in prop::collection::vec((0_u64..100_000, 0..2 * SECOND), 1..40),
        ) {
            let mut bucket = bucket(rate, burst_ms);
            let mut now = 0;
            let mut admitted = Vec::new();
            for (tokens, pause) in requests {
                if admit(&mut bucket, tokens, now) {
                    admitted.push((now, tokens));
                }
                now += pause;
            }
            let largest = admitted.iter().map(|(_, tokens)| bucket.cost(*tokens)).max().unwrap_or(0);
            let slack = u128::from(bucket.burst.max(largest));
            for (first, (begin, _)) in admitted.iter().enumerate() {
                let mut sum = 0;
                for (end, tokens) in &admitted[first..] {
                    sum += u128::from(*tokens);
                    let allowed = (slack + u128::from(end - begin)) * u128::from(rate);
                    prop_assert!(sum * u128::from(SECOND) <= allowed);
                }
            }
        }

        /// Who waits as long as told is admitted, and not a moment earlier.
        #[test]
        fn a_wait_is_long_enough_and_no_longer(
            rate in 1_u64..10_000_000_000,
            burst_ms in 1_u32..5000,
            requests in prop::collection::vec(1_u64..100_000, 1..40),
        ) {
            let mut bucket = bucket(rate, burst_ms);
            let mut now = 0;
            for tokens in requests {
                let wait = bucket.wait(tokens, now);
                if wait > 0 {
                    prop_assert!(bucket.wait(tokens, now + wait - 1) > 0);
                }
                now += wait;
                prop_assert!(admit(&mut bucket, tokens, now));
            }
        }
    }
}
