//! What a run needs: parameters, memory per rank, bytes on the wire, checkpoint size.
