//! A limit lets so much through and no more, and holds nothing else up.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use mayu_vmm_api::RateLimit;

use super::super::worker::MAX_TRANSFER;
use super::*;

/// Four sectors at once, and then none for as long as a test runs.
const NEARLY_CLOSED: RateLimit =
    RateLimit { bandwidth: NonZeroU64::new(1), operations: None, burst_ms: 4 * 512 * 1000 };

fn limiter(limit: &RateLimit) -> RateLimiter {
    RateLimiter::new(limit).unwrap()
}

/// A disk whose guest has read all that it may, and has asked for one sector more: where that one's status will be.
fn throttled(limiter: &RateLimiter) -> (Disk, u64) {
    let mut disk = Disk::limited(false, limiter.clone());
    let reads: Vec<_> = (0..5).map(|sector| disk.add(VIRTIO_BLK_T_IN, sector, &[], 512)).collect();
    assert_eq!(disk.driver.exchange(0, 4).len(), 4);
    for (sector, (target, status)) in (0_u8..).zip(&reads[..4]) {
        assert_eq!(disk.driver.read(*status, 1), [OK]);
        assert_eq!(disk.driver.read(*target, 512), [sector; 512]);
    }
    let (_, last) = reads[4];
    assert_nothing_more_is_served(&mut disk, last);
    (disk, last)
}

/// A pause waits until the thread has done all that it may.
fn assert_nothing_more_is_served(disk: &mut Disk, status: u64) {
    disk.driver.transport.pause();
    assert_eq!(disk.driver.queues[0].pending(), 0);
    assert_eq!(disk.driver.read(status, 1), [UNTOUCHED]);
    disk.driver.transport.resume();
}

#[test]
fn requests_wait_for_their_limit_and_are_served_then() {
    let limit = RateLimit { bandwidth: NonZeroU64::new(1_000_000), operations: None, burst_ms: 1 };
    let mut disk = Disk::limited(false, limiter(&limit));
    let started = Instant::now();
    let reads: Vec<_> = (0..10)
        .map(|sector| {
            disk.add(VIRTIO_BLK_T_OUT, sector, &[0xab; 2048], 0);
            (sector, disk.add(VIRTIO_BLK_T_IN, sector + 20, &[], 2048))
        })
        .collect();
    assert_eq!(disk.driver.exchange(0, 20).len(), 20);
    // Each is larger than the burst, so each but the first has waited for the one before.
    assert!(started.elapsed() >= Duration::from_micros(19 * 2048));
    for (sector, (target, status)) in reads {
        assert_eq!(disk.driver.read(status, 1), [OK]);
        assert_eq!(disk.driver.read(target, 2048), disk.contents(sector + 20, 2048));
    }
    assert_eq!(disk.errors(), 0);
}

#[test]
fn requests_are_counted_whatever_they_ask_for() {
    let limit = RateLimit { bandwidth: None, operations: NonZeroU64::new(100), burst_ms: 20 };
    let mut disk = Disk::limited(false, limiter(&limit));
    let started = Instant::now();
    for _ in 0..5 {
        disk.add(VIRTIO_BLK_T_FLUSH, 0, &[], 0);
        // Nowhere to answer.
        let header = disk.header(VIRTIO_BLK_T_OUT, 3);
        disk.driver.queues[0].add(&[Descriptor::readable(header, 16)]);
    }
    assert_eq!(disk.driver.exchange(0, 10).len(), 10);
    assert!(started.elapsed() >= Duration::from_millis(80), "two at once, and one each 10 ms");
}

#[test]
fn a_request_that_is_larger_than_the_burst_passes_a_full_bucket() {
    let mut disk = Disk::limited(false, limiter(&NEARLY_CLOSED));
    let answer = disk.read(0, 16 * 512);
    assert_eq!((answer.status, answer.data), (OK, disk.contents(0, 16 * 512)));
}

#[test]
fn a_request_that_cannot_be_costs_no_more_than_the_largest_that_can() {
    // As many bytes as there are milliseconds: enough for the largest request, and a sector.
    let limit = RateLimit {
        bandwidth: NonZeroU64::new(1000),
        operations: None,
        burst_ms: u32::try_from(MAX_TRANSFER).unwrap() + 512,
    };
    let mut disk = Disk::limited(false, limiter(&limit));
    let header = disk.header(VIRTIO_BLK_T_IN, 0);
    let too_long = [Descriptor::readable(header, 16), Descriptor::writable(1 << 20, 60 << 20)];
    assert_eq!(disk.serve(&too_long), 1);
    assert_eq!(disk.errors(), 1);
    disk.assert_works();
}

#[test]
fn a_driver_that_resets_the_device_does_not_wait_and_gains_nothing() {
    let (mut disk, _) = throttled(&limiter(&NEARLY_CLOSED));
    for _ in 0..3 {
        disk.driver.start(FLUSH);
        let (_, status) = disk.add(VIRTIO_BLK_T_IN, 7, &[], 512);
        disk.driver.kick(0);
        disk.driver.run();
        assert_nothing_more_is_served(&mut disk, status);
    }
}

#[test]
fn a_disk_that_waits_can_be_emptied() {
    let (disk, _) = throttled(&limiter(&NEARLY_CLOSED));
    disk.slot.detach().unwrap();
}

#[test]
fn a_disk_that_waits_can_be_paused_and_goes_on_elsewhere() {
    let (mut disk, status) = throttled(&limiter(&NEARLY_CLOSED));
    disk.driver.transport.pause();
    let state = disk.driver.transport.save().unwrap();
    let (block, _slot) = Block::new(Some((numbered(SECTORS), false))).unwrap();
    let mut driver = disk.driver.move_to(Box::new(block));
    driver.transport.restore(&state).unwrap();
    driver.transport.resume();
    driver.run_until(|driver| driver.queues[0].pending() == 1);
    assert_eq!(driver.read(status, 1), [OK]);
}

#[test]
fn kicks_do_not_make_it_go_faster() {
    let (mut disk, status) = throttled(&limiter(&NEARLY_CLOSED));
    for _ in 0..1000 {
        disk.driver.kick(0);
        disk.driver.run();
    }
    assert_nothing_more_is_served(&mut disk, status);
}
