//! The order of the ring on which snapshots travel: neighbours on different hosts wherever that can be, so that a host takes
//! no part of the state with it.

use std::collections::BTreeMap;

/// The ranks of a ring, in its order. `addresses` is where each rank is reached, by rank, as `host:port`.
///
/// Ranks of the same host go to every second place, those of the largest host first: they are neighbours only where one
/// host has more than half of all ranks.
pub fn apart(addresses: &[String]) -> Vec<u32> {
    let mut hosts: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for (address, rank) in addresses.iter().zip(0..) {
        hosts.entry(host(address)).or_default().push(rank);
    }
    let mut hosts: Vec<Vec<u32>> = hosts.into_values().collect();
    hosts.sort_by_key(|ranks| (std::cmp::Reverse(ranks.len()), ranks[0]));
    let count = addresses.len();
    let places = (0..count).step_by(2).chain((1..count).step_by(2));
    let mut order = vec![0; count];
    for (place, rank) in places.zip(hosts.into_iter().flatten()) {
        order[place] = rank;
    }
    order
}

/// The host of `host:port`.
fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses(hosts: &[usize]) -> Vec<String> {
        let ranks = hosts.iter().enumerate();
        ranks
            .map(|(rank, host)| format!("[fe80::{host}]:{rank}"))
            .collect()
    }

    proptest! {
        #[test]
        fn every_rank_has_a_place_and_a_neighbour_on_another_host_unless_one_host_has_most(
            hosts in prop::collection::vec(0..5usize, 2..17),
        ) {
            let order = apart(&addresses(&hosts));
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..hosts.len() as u32));
            let largest = (0..5).map(|host| hosts.iter().filter(|of| **of == host).count()).max();
            if largest.is_some_and(|largest| 2 * largest <= hosts.len()) {
                for (place, rank) in order.iter().enumerate() {
                    let next = order[(place + 1) % order.len()];
                    prop_assert_ne!(hosts[*rank as usize], hosts[next as usize], "{:?} {:?}", hosts, order);
                }
            }
        }
    }

    #[test]
    fn two_hosts_take_turns() {
        assert_eq!(apart(&addresses(&[0, 0, 1, 1])), [0, 2, 1, 3]);
        assert_eq!(apart(&addresses(&[0])), [0]);
    }
}
