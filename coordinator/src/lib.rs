//! Holds the fleet's state, decides, persists, then acts; serves gRPC.
