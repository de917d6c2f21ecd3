// Checks of arguments: the message is put together only where one fails.

#pragma once

#include <sstream>
#include <stdexcept>

namespace flexlora {

// Throws std::invalid_argument (ValueError in Python) with the parts joined, unless `holds`.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

}  // namespace flexlora
