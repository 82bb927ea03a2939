//! The rules of one host: what its agent does with orders, ends, leases and drains.
